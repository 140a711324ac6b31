"""The base of all schemas."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
