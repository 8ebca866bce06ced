"""The critic: a value for every token, from a head on the policy's trunk or from a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rft.batch import Batch
from rft.kernels.attention import hidden_states, prepare_model
from rft.kernels.attention_route import Kernel


class Critic(nn.Module):
    """A linear head that starts at 0, on the policy's hidden states or on those of `trunk`.

    trunk: a causal LM that is trained with the head and shares nothing with the policy; its language
    model head is not used. None: the head reads the policy's states, and its gradient goes there too, but
        for steps that train the critic only.
    kernel: the attention of `trunk`, as in `prepare_model`.
    """

    def __init__(self, hidden_size: int, trunk: Any | None = None, kernel: Kernel = "auto") -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if trunk is not None:
            prepare_model(trunk, kernel)

    def states(self, batch: Batch, of_policy: Tensor) -> Tensor:
        """[T, H]: what the head reads, the state after each token; of_policy: [T, H], the policy's."""
        if self.trunk is None:
            return of_policy
        found: Tensor = hidden_states(self.trunk, batch)
        return found

    def forward(self, states: Tensor) -> Tensor:
        """[n] float32: the values at states [n, H]."""
        # The head is float32, but where DeepSpeed holds the whole network in bfloat16.
        values: Tensor = self.head(states.to(self.head.weight.dtype))
        return values[:, 0].float()

    def trained(self) -> Iterator[nn.Parameter]:
        """Its parameters; without the trunk's language model head where that is a matrix of its own."""
        yield from self.head.parameters()
        if self.trunk is None:
            return
        output = self.trunk.get_output_embeddings()
        tied = output.weight is self.trunk.get_input_embeddings().weight
        for parameter in self.trunk.parameters():
            if parameter.requires_grad and (tied or all(parameter is not p for p in output.parameters())):
                yield parameter
