"""Registry of algorithms by name; a new algorithm needs a module and an entry here."""

from __future__ import annotations

from rft.algorithms.base import Algorithm, PolicyOutput, Rollout
from rft.algorithms.policy_gradient.cispo import CISPO
from rft.algorithms.policy_gradient.cory import CORY
from rft.algorithms.policy_gradient.covariance import ClipCov, KLCov
from rft.algorithms.policy_gradient.dapo import DAPO
from rft.algorithms.policy_gradient.distill import Distill
from rft.algorithms.policy_gradient.dppo import DPPO
from rft.algorithms.policy_gradient.dr_grpo import DrGRPO
from rft.algorithms.policy_gradient.gmpo import GMPO
from rft.algorithms.policy_gradient.gpg import GPG
from rft.algorithms.policy_gradient.grpo import GRPO
from rft.algorithms.policy_gradient.gspo import GSPO
from rft.algorithms.policy_gradient.luffy import LUFFY
from rft.algorithms.policy_gradient.luspo import LUSPO
from rft.algorithms.policy_gradient.m2po import M2PO
from rft.algorithms.policy_gradient.max_rl import MaxRL
from rft.algorithms.policy_gradient.mml import MML, MMLPartial
from rft.algorithms.policy_gradient.opo import OPO
from rft.algorithms.policy_gradient.per_step import PerStep
from rft.algorithms.policy_gradient.ppo import PPO
from rft.algorithms.policy_gradient.prefix_rft import PrefixRFT
from rft.algorithms.policy_gradient.raft import RAFT, ExpertIteration, RAFTPlusPlus, ReinforceRej
from rft.algorithms.policy_gradient.reinforce_pp import ReinforcePP
from rft.algorithms.policy_gradient.remax import ReMax
from rft.algorithms.policy_gradient.rloo import RLOO
from rft.algorithms.policy_gradient.sapo import SAPO
from rft.algorithms.policy_gradient.topr import TOPR
from rft.algorithms.policy_gradient.vespo import VESPO
from rft.algorithms.preference.bco import BCO
from rft.algorithms.preference.cpo import CPO
from rft.algorithms.preference.dpo import DPO
from rft.algorithms.preference.iterative_dpo import IterativeDPO
from rft.algorithms.preference.kto import KTO
from rft.algorithms.preference.nash_md import NashMD
from rft.algorithms.preference.online_dpo import OnlineDPO
from rft.algorithms.preference.orpo import ORPO
from rft.algorithms.preference.prefix_dpo import PrefixDPO
from rft.algorithms.preference.reward_difference import RewardDifference
from rft.algorithms.preference.simpo import SimPO
from rft.algorithms.preference.sppo import SPPO
from rft.algorithms.preference.trajectory_balance import TrajectoryBalance
from rft.algorithms.reward_models.reward_model import (
    PairwiseReward,
    ProcessReward,
    RewardModel,
    RewardRegression,
)
from rft.algorithms.supervised.asft import ASFT
from rft.algorithms.supervised.c_rlft import CRLFT
from rft.algorithms.supervised.dft import DFT
from rft.algorithms.supervised.forgetting import Forgetting
from rft.algorithms.supervised.ift import IFT
from rft.algorithms.supervised.iw_sft import IWSFT
from rft.algorithms.supervised.logit_distill import LogitDistill
from rft.algorithms.supervised.masked_thought import MaskedThought
from rft.algorithms.supervised.mft import MFT
from rft.algorithms.supervised.neft import NEFT
from rft.algorithms.supervised.poft import PoFT
from rft.algorithms.supervised.q_tuning import QTuning
from rft.algorithms.supervised.rwr import RWR
from rft.algorithms.supervised.sft import SFT
from rft.algorithms.supervised.token_cleaning import SSToken, TokenCleaning
from rft.algorithms.supervised.weak_to_strong import WeakToStrong

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "luspo": LUSPO,
    "gmpo": GMPO,
    "sapo": SAPO,
    "vespo": VESPO,
    "dppo": DPPO,
    "m2po": M2PO,
    "topr": TOPR,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
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
    "mml": MML,
    "mml_partial": MMLPartial,
    "prefix_rft": PrefixRFT,
    "luffy": LUFFY,
    "sppo": SPPO,
    "online_dpo": OnlineDPO,
    "nash_md": NashMD,
    "iterative_dpo": IterativeDPO,
    "prefix_dpo": PrefixDPO,
    "reward_difference": RewardDifference,
    "trajectory_balance": TrajectoryBalance,
    "cory": CORY,
    "per_step": PerStep,
    "distill": Distill,
    "sft": SFT,
    "mft": MFT,
    "dft": DFT,
    "asft": ASFT,
    "iw_sft": IWSFT,
    "ift": IFT,
    "c_rlft": CRLFT,
    "neft": NEFT,
    "masked_thought": MaskedThought,
    "token_cleaning": TokenCleaning,
    "ss_token": SSToken,
    "q_tuning": QTuning,
    "forgetting": Forgetting,
    "weak_to_strong": WeakToStrong,
    "logit_distill": LogitDistill,
    "rwr": RWR,
    "poft": PoFT,
    "dpo": DPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "kto": KTO,
    "bco": BCO,
    "reward_model": RewardModel,
    "reward_regression": RewardRegression,
    "pairwise_reward": PairwiseReward,
    "process_reward": ProcessReward,
}

__all__ = [
    "ALGORITHMS",
    "ASFT",
    "BCO",
    "CISPO",
    "CORY",
    "CPO",
    "CRLFT",
    "DAPO",
    "DFT",
    "DPO",
    "DPPO",
    "GMPO",
    "GPG",
    "GRPO",
    "GSPO",
    "IFT",
    "IWSFT",
    "KTO",
    "LUFFY",
    "LUSPO",
    "M2PO",
    "MFT",
    "MML",
    "NEFT",
    "OPO",
    "ORPO",
    "PPO",
    "RAFT",
    "RLOO",
    "RWR",
    "SAPO",
    "SFT",
    "SPPO",
    "TOPR",
    "VESPO",
    "Algorithm",
    "ClipCov",
    "Distill",
    "DrGRPO",
    "ExpertIteration",
    "Forgetting",
    "IterativeDPO",
    "KLCov",
    "LogitDistill",
    "MMLPartial",
    "MaskedThought",
    "MaxRL",
    "NashMD",
    "OnlineDPO",
    "PairwiseReward",
    "PerStep",
    "PoFT",
    "PolicyOutput",
    "PrefixDPO",
    "PrefixRFT",
    "ProcessReward",
    "QTuning",
    "RAFTPlusPlus",
    "ReMax",
    "ReinforcePP",
    "ReinforceRej",
    "RewardDifference",
    "RewardModel",
    "RewardRegression",
    "Rollout",
    "SSToken",
    "SimPO",
    "TokenCleaning",
    "TrajectoryBalance",
    "WeakToStrong",
]
