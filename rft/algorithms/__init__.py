"""Every algorithm by name. Adding one takes a file and an entry here."""

from __future__ import annotations

from rft.algorithms.asft import ASFT
from rft.algorithms.base import Algorithm, PolicyOutput, Rollout
from rft.algorithms.c_rlft import CRLFT
from rft.algorithms.checks import problems
from rft.algorithms.cispo import CISPO
from rft.algorithms.cory import CORY
from rft.algorithms.cpo import CPO
from rft.algorithms.dapo import DAPO
from rft.algorithms.dft import DFT
from rft.algorithms.distill import Distill
from rft.algorithms.dpo import DPO
from rft.algorithms.dr_grpo import DrGRPO
from rft.algorithms.forgetting import Forgetting
from rft.algorithms.gpg import GPG
from rft.algorithms.grpo import GRPO
from rft.algorithms.gspo import GSPO
from rft.algorithms.ift import IFT
from rft.algorithms.iterative_dpo import IterativeDPO
from rft.algorithms.iw_sft import IWSFT
from rft.algorithms.kto import KTO
from rft.algorithms.luffy import LUFFY
from rft.algorithms.masked_thought import MaskedThought
from rft.algorithms.max_rl import MaxRL
from rft.algorithms.nash_md import NashMD
from rft.algorithms.neft import NEFT
from rft.algorithms.online_dpo import OnlineDPO
from rft.algorithms.opo import OPO
from rft.algorithms.orpo import ORPO
from rft.algorithms.per_step import PerStep
from rft.algorithms.poft import PoFT
from rft.algorithms.ppo import PPO
from rft.algorithms.prefix_rft import PrefixRFT
from rft.algorithms.raft import RAFT, ExpertIteration, RAFTPlusPlus, ReinforceRej
from rft.algorithms.reinforce_pp import ReinforcePP
from rft.algorithms.remax import ReMax
from rft.algorithms.reward_difference import RewardDifference
from rft.algorithms.reward_model import PairwiseReward, ProcessReward, RewardModel, RewardRegression
from rft.algorithms.rloo import RLOO
from rft.algorithms.sft import SFT
from rft.algorithms.simpo import SimPO
from rft.algorithms.sppo import SPPO
from rft.algorithms.token_cleaning import SSToken, TokenCleaning
from rft.algorithms.weak_to_strong import WeakToStrong

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePP,
    "gpg": GPG,
    "opo": OPO,
    "remax": ReMax,
    "max_rl": MaxRL,
    "raft": RAFT,
    "raft_pp": RAFTPlusPlus,
    "reinforce_rej": ReinforceRej,
    "expert_iteration": ExpertIteration,
    "prefix_rft": PrefixRFT,
    "luffy": LUFFY,
    "sppo": SPPO,
    "online_dpo": OnlineDPO,
    "nash_md": NashMD,
    "iterative_dpo": IterativeDPO,
    "reward_difference": RewardDifference,
    "cory": CORY,
    "per_step": PerStep,
    "distill": Distill,
    "sft": SFT,
    "dft": DFT,
    "asft": ASFT,
    "iw_sft": IWSFT,
    "ift": IFT,
    "c_rlft": CRLFT,
    "neft": NEFT,
    "masked_thought": MaskedThought,
    "token_cleaning": TokenCleaning,
    "ss_token": SSToken,
    "forgetting": Forgetting,
    "weak_to_strong": WeakToStrong,
    "poft": PoFT,
    "dpo": DPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "kto": KTO,
    "reward_model": RewardModel,
    "reward_regression": RewardRegression,
    "pairwise_reward": PairwiseReward,
    "process_reward": ProcessReward,
}

__all__ = ["ALGORITHMS", "Algorithm", "PolicyOutput", "Rollout", "problems"]
