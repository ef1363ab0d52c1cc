"""mergekit's YAML, read as it stands and turned into a recipe."""

from mergewell.mergekit.config import is_mergekit
from mergewell.mergekit.convert import recipe_from_mergekit
from mergewell.mergekit.stages import recipe_from_documents

__all__ = ["is_mergekit", "recipe_from_documents", "recipe_from_mergekit"]
