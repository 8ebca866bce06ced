"""Options of the built-in tasks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.config.base import ConfigModel

Operator = Literal["+", "-", "*"]
Style = Literal["lines", "chain", "prose", "code", "direct"]

# Defaults per variant; explicit fields take precedence. `hard` is for a model warm-started on the standard
# problems: it knows the single steps, but has not seen chains of this length.
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
    """Multi-step arithmetic problems, as word problems or expressions."""

    variant: Literal["standard", "hard"] = Field(
        "standard",
        description="preset of the options below; `hard`: longer problems, demonstrations without errors",
    )
    form: Literal["words", "expression", "mixed"] = Field(
        "words", description="form of the problems: words (word problem), expression, or mixed (50 % each)"
    )
    min_operands: int = Field(3, ge=2, le=12, description="minimum operands per problem")
    max_operands: int = Field(3, ge=2, le=12, description="maximum operands per problem")
    operators: tuple[Operator, ...] = Field(("+", "-"), description="operators used, of + - *")
    largest: int = Field(9, ge=2, description="largest operand of + and -")
    largest_factor: int = Field(4, ge=2, description="largest operand of *")
    limit: int = Field(99, ge=4, description="largest intermediate result; results are never negative")
    styles: dict[Style, float] = Field(
        default_factory=_styles, description="solution formats of the demonstrations, with sampling weights"
    )
    wrong_fraction: float | dict[Style, float] = Field(
        default_factory=_wrong_fraction,
        description="fraction of wrong steps in demonstrations; one number, or one per format",
    )
    slips: tuple[int, ...] = Field(
        (1, 2),
        description="error sizes of wrong steps, one drawn per step; errors of one sign cannot cancel out",
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
        """Return the fraction of wrong steps in demonstrations of a format; 0 if not configured."""
        shares = self.wrong_fraction
        return shares.get(style, 0.0) if isinstance(shares, dict) else shares

    @field_validator("wrong_fraction")
    @classmethod
    def _check_wrong_fraction(cls, wrong: float | dict[Style, float]) -> float | dict[Style, float]:
        if not all(0 <= x <= 1 for x in (wrong.values() if isinstance(wrong, dict) else [wrong])):
            raise ValueError("write a share between 0 and 1")
        return wrong

    @model_validator(mode="after")
    def _check(self) -> ArithmeticConfig:
        if self.min_operands > self.max_operands:
            raise ValueError(
                f"min_operands ({self.min_operands}) must not exceed max_operands ({self.max_operands})"
            )
        if not self.slips or 0 in self.slips:
            raise ValueError("slips must list the errors of wrong steps, none of them 0, such as [-1, 1]")
        if not self.operators:
            raise ValueError('operators must name at least one of "+", "-", "*"')
        if "+" not in self.operators and "-" not in self.operators and self.limit < 2**self.max_operands:
            raise ValueError(
                f"limit {self.limit} is too small for a chain of {self.max_operands} factors; raise it, or "
                f"lower max_operands"
            )
        if self.largest > self.limit:
            raise ValueError(f"largest ({self.largest}) must not exceed limit ({self.limit})")
        return self


class SumsConfig(ConfigModel):
    """Sums that are too long to be worked out in the head, demonstrated with and without a calculator."""

    operands: int = Field(4, ge=2, le=12, description="numbers per sum")
    digits: int = Field(2, ge=1, le=9, description="digits of each number")
    operators: tuple[Literal["+", "-"], ...] = Field(("+", "-"), min_length=1, description="operators used")
    limit: int | None = Field(
        None,
        ge=1,
        description="largest partial result (none: any); 99 is one token of the tiny model, 100 two",
    )
    calls: float = Field(0.25, ge=0, le=1, description="share of demonstrations that call the calculator")

    @model_validator(mode="after")
    def _check(self) -> SumsConfig:
        least = 10 ** (self.digits - 1)
        if self.limit is not None and ("-" not in self.operators or self.limit < 2 * least):
            raise ValueError(
                f"limit: {self.limit} needs the operator -, and with {self.digits} digits it is at least "
                f"{2 * least}"
            )
        return self


class GuessConfig(ConfigModel):
    """A number to guess within a few tries, each answered by `higher` or `lower` and the range left."""

    largest: int = Field(200, ge=8, le=99_999, description="the number is between 1 and this")
    tries: int = Field(8, ge=1, le=64, description="guesses of a demonstration at most")
    careless: float = Field(
        0.0, ge=0, le=1, description="share of a demonstration's guesses that pay no attention to the answers"
    )


class ReasoningGymConfig(ConfigModel):
    """Task of the reasoning-gym package."""

    task: str = Field("chain_sum", description="name of the reasoning-gym task, e.g. chain_sum")
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the task, passed to reasoning-gym unchanged"
    )
    suffix: str = Field(
        "\nGive the final answer as <answer>...</answer>.\n",
        description="text appended to each question, which defines the answer format",
    )
