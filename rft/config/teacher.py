"""Config section `teacher`: a reference model behind an endpoint."""

from __future__ import annotations

from pydantic import Field, field_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText
from rft.utils.urls import has_credentials, without_credentials


class TeacherConfig(ConfigModel):
    """A model on a server, in place of the reference: vLLM, `rft serve`, or another one with
    `prompt_logprobs`."""

    base_url: str = Field(description="URL of the server, up to and including `/v1`")
    model: str = Field(description="name of the model on the server")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if any")
    top_k: int = Field(
        20,
        ge=0,
        description="most likely tokens to read at each place, for algorithms that compare distributions "
        "(vLLM allows 20, or its `--max-logprobs`)",
    )
    template: str | None = Field(
        None,
        description="the prompt that the teacher reads, with `{prompt}` and other columns of the row: a "
        "hint or the answer, which the policy does not see (context distillation)",
    )
    tokenizer: PathText | None = Field(
        None,
        description="folder or hub name of the teacher's tokenizer, if it is not the policy's; for "
        "algorithms with `by_rank`",
    )
    concurrency: int = Field(16, ge=1, description="requests at a time")
    retries: int = Field(5, ge=0, description="attempts after a failed one, before the run stops")
    request_timeout_s: float = Field(300.0, gt=0, description="time limit of a request, in seconds")
    cache: PathText | None = Field(
        None,
        description="folder for the scores of an offline dataset, which is scored once; with them a run "
        "needs no server (none: OUTPUT_DIR/.cache)",
    )

    @field_validator("base_url")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is not a URL; write http://HOST:PORT/v1")
        if has_credentials(value):
            raise ValueError(
                f"{without_credentials(value)} contains a user name or password, which logs would show: "
                "put the key into the environment variable that api_key_env names"
            )
        return value.rstrip("/")
