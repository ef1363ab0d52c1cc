"""Choose the experts whose average does best on held-out samples, one after the other."""

from __future__ import annotations

from typing import ClassVar

from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial, judged
from mergewell.learners.ops import best_first, greedy_selection
from mergewell.recipe import MethodChoice, Recipe


class GreedySoup(Learner):
    """Average the experts that help: best first, each kept if the metric does not fall.

    The result is never worse on the held-out samples than the best expert alone. It suits experts
    for one task; of experts for different tasks a metric of a single task keeps one.

    Paper: Wortsman et al. 2022, "Model soups", arXiv:2203.05482, recipe 1 (greedy soup).
    Departures: none. The recipe's method and coefficients are replaced by a plain average, its
    rules stay; BatchNorm statistics are averaged like weights.
    """

    paper: ClassVar[str] = "arXiv:2203.05482"
    data: ClassVar[str] = "labelled"

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe of the soup; 2K - 1 merges are judged."""
        metric, count = self.metric_of(material), len(recipe.experts)
        trials: list[Trial] = []

        def judge(members: tuple[int, ...]) -> float:
            tried = soup_of(recipe, members)
            score = judged(tried, material, metric)
            trials.append(Trial(tried, score, kept=False))
            if on_step is not None:
                on_step("soups", len(trials), 2 * count - 1)
            return score

        alone = [judge((place,)) for place in range(count)]
        order = best_first(alone)
        kept, score = greedy_selection(order, judge, first=alone[order[0]])
        steps = [soup_of(recipe, kept[: size + 1]) for size in range(len(kept))]
        names = ", ".join(recipe.experts[place].path for place in kept)
        note = (
            f"greedy_soup kept {len(kept)} of {count} experts ({names}): {score:.4g} on the "
            f"held-out samples that chose them, the best expert alone {alone[order[0]]:.4g}."
        )
        result = soup_of(recipe, kept)
        return Learned(
            result.model_copy(update={"notes": (*recipe.notes, note)}),
            score,
            tuple(Trial(t.recipe, t.score, kept=t.recipe in steps) for t in trials),
        )


def soup_of(recipe: Recipe, members: tuple[int, ...]) -> Recipe:
    """Return the recipe of the average of some of the experts, by their places."""
    experts = [recipe.experts[place].model_copy(update={"coefficient": 1.0}) for place in members]
    rules = [
        rule
        if rule.coefficients is None
        else rule.model_copy(
            update={"coefficients": tuple(rule.coefficients[place] for place in members)}
        )
        for rule in recipe.rules
    ]
    return recipe.model_copy(
        update={
            "experts": tuple(experts),
            "rules": tuple(rules),
            "method": MethodChoice(name="average"),
        }
    )
