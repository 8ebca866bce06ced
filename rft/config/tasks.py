"""Options of the embedded tasks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.config.base import ConfigModel

Operator = Literal["+", "-", "*"]
Style = Literal["lines", "chain", "prose", "code", "direct"]

# Defaults that a variant changes; a field that the user names always wins. `hard` is for a model that was
# warm-started on the standard problems: it knows the steps, but has never made a chain this long.
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "hard": {
        "min_operands": 5,
        "max_operands": 5,
        "styles": {"lines": 1.0},
        "wrong_fraction": 0.0,
    },
}


def _styles() -> dict[Style, float]:
    return {"lines": 0.5, "chain": 0.5}


def _wrong_fraction() -> float | dict[Style, float]:
    return {"lines": 0.01, "chain": 0.55}


class ArithmeticConfig(ConfigModel):
    """An arithmetic problem of a few steps, as a short story or as an expression."""

    variant: Literal["standard", "hard"] = Field(
        "standard",
        description="a set of defaults for the fields below; `hard`: longer problems, clean demonstrations",
    )
    form: Literal["words", "expression", "mixed"] = Field(
        "words", description="how a problem is put: a short story, an expression, or either by a coin flip"
    )
    min_operands: int = Field(3, ge=2, le=12, description="fewest numbers in a problem")
    max_operands: int = Field(3, ge=2, le=12, description="most numbers in a problem")
    operators: tuple[Operator, ...] = Field(("+", "-"), description="operators in use, of + - *")
    largest: int = Field(9, ge=2, description="largest operand of + and -")
    largest_factor: int = Field(4, ge=2, description="largest operand of *")
    limit: int = Field(99, ge=4, description="largest intermediate result; none is below 0")
    styles: dict[Style, float] = Field(
        default_factory=_styles, description="solution formats of the demonstrations, each with its weight"
    )
    wrong_fraction: float | dict[Style, float] = Field(
        default_factory=_wrong_fraction,
        description="share of a demonstration's steps that are wrong; one number, or one for each format",
    )
    slips: tuple[int, ...] = Field(
        (1, 2),
        description="what a wrong step is off by: one of these (of one sign, two slips never cancel out)",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_variant(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {**VARIANTS.get(data.get("variant", "standard"), {}), **data}

    @field_validator("styles")
    @classmethod
    def _check_styles(cls, styles: dict[Style, float]) -> dict[Style, float]:
        if not styles or min(styles.values()) < 0 or sum(styles.values()) <= 0:
            raise ValueError("weights must not be negative, and one must be positive: {lines: 1, code: 1}")
        return styles

    def wrong(self, style: Style) -> float:
        """The share of wrong steps in demonstrations of a format; 0 where none is given."""
        shares = self.wrong_fraction
        return shares.get(style, 0.0) if isinstance(shares, dict) else shares

    @field_validator("wrong_fraction")
    @classmethod
    def _check_wrong_fraction(cls, wrong: float | dict[Style, float]) -> float | dict[Style, float]:
        if not all(0 <= x <= 1 for x in (wrong.values() if isinstance(wrong, dict) else [wrong])):
            raise ValueError("a share lies between 0 and 1")
        return wrong

    @model_validator(mode="after")
    def _check(self) -> ArithmeticConfig:
        if self.min_operands > self.max_operands:
            raise ValueError(
                f"min_operands ({self.min_operands}) must not exceed max_operands ({self.max_operands})"
            )
        if not self.slips or 0 in self.slips:
            raise ValueError("slips must name what wrong steps are off by, none of it 0: [-1, 1]")
        if not self.operators:
            raise ValueError('operators must name at least one of "+", "-", "*"')
        if "+" not in self.operators and "-" not in self.operators and self.limit < 2**self.max_operands:
            raise ValueError(f"limit {self.limit} is too small for a chain of {self.max_operands} factors")
        if self.largest > self.limit:
            raise ValueError(f"largest ({self.largest}) must not exceed limit ({self.limit})")
        return self


class ReasoningGymConfig(ConfigModel):
    """Any task of the reasoning-gym package, by name."""

    task: str = Field("chain_sum", description="name of the task in reasoning-gym, such as chain_sum")
    options: dict[str, Any] = Field(
        default_factory=dict, description="the task's own options, handed to reasoning-gym as they are"
    )
    suffix: str = Field(
        "\nGive the final answer as <answer>...</answer>.\n",
        description="text put after each question, so that the answer can be found",
    )
