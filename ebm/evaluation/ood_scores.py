"""The part `ood`: scores of outliers, and how well they are told from the test images."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ebm.data import scaled
from ebm.evaluation import figures, metrics
from ebm.evaluation.evaluation import Evaluation
from ebm.evaluation.outliers import keys_of, outliers

OTHER_SCORES = {  # beside −E(x): of images x whose −E(x) are s, and those of the training images
    "gradient_norm": lambda ev, x, s, train: metrics.gradient_norms(ev.energies[0], x, **ev.how),
    "typicality": lambda ev, x, s, train: metrics.typicality(s, train),
}


def ood(
    ev: Evaluation,
    sets: Sequence[str],
    scores: Sequence[str],
    root: str = "data",
    noise_std: float = 0.3,
    background: str = "black",
    count: int | None = None,
) -> None:
    """Scores of each of the `sets`, and AUROC, AUPR and FPR95 of the test images against it; a set that cannot be had
    is skipped.

    sets                         as `outliers` names them; train and test are always there
    scores                       of OTHER_SCORES, beside −E(x) and the ensemble's mean and spread
    root, noise_std, background  as for `outliers`
    count                        images of a set, random ones, always the same; None for all
    """
    by_score: dict[str, dict[str, metrics.Array]] = {}  # by the score's name, then the set's
    members: dict[str, list[metrics.Array]] = {}  # −E(x) of a set by every energy of the ensemble
    examples: dict[str, Tensor] = {}
    example_scores: dict[str, metrics.Array] = {}
    for key, name in ev.progress("ood", keys_of(["train", "test", *sets]).items(), unit="sets"):
        try:
            x = outliers(name, ev.dataset, root, noise_std, ev.seed, background)
            if len(x) < 2:
                raise ValueError("one image has no spread")
            if count is not None and len(x) > count:
                x = x[ev.chosen(x, count)]
        except Exception as error:  # whatever reading images can raise
            ev.skipped[f"ood/{key}"] = " ".join(str(error).split()) or type(error).__name__
            continue
        members[key] = [metrics.scores(energy, x, **ev.how) for energy in ev.energies]
        for score, values in scores_of(ev, x, members[key], members["train"], scores).items():
            by_score.setdefault(score, {})[key] = values
        if key != "train":
            every = max(len(x) // 4, 1) if name == "constant" else 1  # black to white
            examples[key], example_scores[key] = scaled(x[::every][:4]), members[key][0][::every][:4]
    put_separations(ev, by_score)
    draw_figures(ev, by_score)
    if len(ev.dataset.shape) == 3:
        caption = "Four images of every set with their scores."
        ev.draw("examples.png", caption, figures.scored_images, examples, example_scores)
    columns = {"score": "score/{}/mean", "± std": "score/{}/std"}
    columns |= {"AUROC": "auroc/{}", "AUPR": "aupr/{}", "FPR95": "fpr95/{}"}
    columns |= {f"AUROC {score}": f"auroc/{{}}{suffix(score)}" for score in by_score if score != "score"}
    rows = {key: [key, str(len(values))] for key, values in by_score["score"].items()}
    notes = [f"score: −E(x), higher is more likely.  AUROC: of the {ev.dataset.name} test images against the set"]
    ev.section("Outliers", ["set", "images"], columns, rows, notes, intervals=["AUROC"])


def scores_of(
    ev: Evaluation, x: Tensor, members: list[metrics.Array], train: list[metrics.Array], others: Sequence[str]
) -> dict[str, metrics.Array]:
    """Every score (N,) of images `x`, by its name; `members` are −E(x) by every energy of the ensemble, and `train`
    those of the training images."""
    found = {"score": members[0]}
    found |= {name: OTHER_SCORES[name](ev, x, members[0], train[0]) for name in others}
    if len(members) > 1:
        found["ensemble_mean"], found["ensemble_spread"] = metrics.ensemble(members, train)
    return found


def suffix(score: str) -> str:
    """What the keys of a score's numbers end with."""
    return "" if score == "score" else f"/{score}"


def put_separations(ev: Evaluation, by_score: Mapping[str, Mapping[str, metrics.Array]]) -> None:
    """The numbers: mean and spread of −E(x) of each set, and how well each score tells it from the test images."""
    for key, values in by_score["score"].items():
        ev.put(f"score/{key}/mean", values.mean())
        ev.put(f"score/{key}/std", values.std(ddof=1))
    for score, sets in by_score.items():
        for key, values in sets.items():
            ci95 = metrics.separation_ci95(sets["test"], values, ev.bootstrap, ev.rng())
            for name, value in metrics.separation(sets["test"], values).items():
                ev.put(f"{name}/{key}{suffix(score)}", value, ci95[name])


def draw_figures(ev: Evaluation, by_score: Mapping[str, Mapping[str, metrics.Array]]) -> None:
    by_set = by_score["score"]
    ev.draw("scores.png", "Scores −E(x) of every set, each to its own height.", figures.scores, by_set)
    others = {key: values for key, values in by_set.items() if key != "test"}
    caption = f"Test images accepted over outliers accepted as the threshold on −E(x) falls ({ev.dataset.name})."
    ev.draw("roc.png", caption, figures.roc, by_set["test"], others)
    if len(by_score) > 1:
        auroc = {score: {key: ev.triple(f"auroc/{key}{suffix(score)}") for key in others} for score in by_score}
        caption = "AUROC by set and score, with 95 % bootstrap intervals."
        ev.draw("auroc.png", caption, figures.intervals, {"AUROC": auroc})
