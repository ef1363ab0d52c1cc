"""TokenizerChoice: the part of a recipe that says which tokenizer the result gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_FROZEN = ConfigDict(
    frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
)

SAME, BASE, UNION = "same", "base", "union"


class TokenSource(BaseModel):
    """Where a token's embedding comes from in models that lack it, or in all of them."""

    model_config = _FROZEN

    model: str | None = None
    """A model of the merge, by its path; zeros when absent."""

    token: str | None = None
    """Another token of that model, whose row is taken; the token itself when absent."""

    id: Annotated[int, Field(ge=0)] | None = None
    """The number of that model's row, in place of `token`."""

    force: bool = False
    """Take it in every model, also in those that have the token."""

    @model_validator(mode="after")
    def _is_one(self) -> TokenSource:
        if self.model is None and (self.token is not None or self.id is not None):
            raise ValueError("name the model that the token is of")
        if self.token is not None and self.id is not None:
            raise ValueError("give one of token and id")
        return self


class TokenizerChoice(BaseModel):
    """Which vocabulary the result has, and where the rows of its embeddings come from."""

    model_config = _FROZEN

    source: str = SAME
    """`same`: all models have one, or the plan is refused; `base`: the base's (or first expert's);
    `union`: the base's and whatever else the experts have; or a folder whose tokenizer is taken."""

    tokens: dict[str, TokenSource] = Field(default_factory=dict[str, TokenSource])
    """Sources of single tokens' embeddings."""

    missing: Literal["zero", "mean", "pieces"] = "zero"
    """What tokens get that no model has: zeros, the mean of all of the model's rows, or the mean of
    the rows of the pieces into which the model's own tokenizer cuts the token's text."""

    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    """Round the number of rows up to a multiple of this; rows of no token are the mean of all."""

    chat_template: str | None = None
    """`auto`: what most models have; or the template itself; that of the source when absent."""

    @model_validator(mode="after")
    def _changes_something(self) -> TokenizerChoice:
        if self.source == SAME and (self.tokens or self.pad_to_multiple_of):
            raise ValueError("tokens and pad_to_multiple_of need a source: base, union or a folder")
        return self

    @property
    def is_path(self) -> bool:
        """True where the source is a folder."""
        return self.source not in (SAME, BASE, UNION)

    def moved(self, seen: Callable[[str], str]) -> TokenizerChoice:
        """Return the choice with its paths as `seen` gives them."""
        return self.model_copy(
            update={
                "source": seen(self.source) if self.is_path else self.source,
                "tokens": {
                    token: source
                    if source.model is None
                    else source.model_copy(update={"model": seen(source.model)})
                    for token, source in self.tokens.items()
                },
            }
        )
