"""The kind of model that every group of a config is."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A group that refuses keys it does not know and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
