"""Tables and figures of the runs that benchmarks/sweep.py wrote; benchmarks/report.py puts them into the pages."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import sweep
from performance_tables import markdown
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from resblocks.training import Result, draw_figures, get_recipe
from resblocks.training.figures import draw_depths
from resblocks.training.files import write_atomic
from resblocks.training.recipe import whole_recipe
from resblocks.training.result import interval, mean_and_std, seeds_in_words, title

ROOT = Path(__file__).resolve().parent.parent
RUNS = sweep.RUNS
PUBLISHED = ROOT / "tests" / "expected" / "cifar10.json"
FIGURES = ROOT / "docs" / "figures"
# The options of a run beside its recipe, as they are where a run does not say them.
OPTIONS = {
    "channels_last": True,
    "small_maps": False,
    "compile": None,
    "graph": False,
    "deterministic": False,
}
# The programmes that answer whether skips help.
BOTH_WAYS = ("paper-15-whole-cpu", "degradation-cpu", "degradation-float32-cpu")
# What is shown of each programme, with what the picture says to those who do not see it.
SHOWN = {
    "figure4_training_all": "Training accuracy and loss by epoch",
    "figure5_validation_all": "Test accuracy and loss by epoch",
    "figure3_gradients": "Gradient magnitude by layer before and after training",
    "depths": "Accuracy against depth, with and without skips",
}


def read(programme: str) -> list[dict[str, Any]]:
    """The runs of a programme in its order, as far as they are there."""
    files = [RUNS / programme / f"{cell.name}.json" for cell in sweep.PROGRAMMES[programme]]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that a table may compare: the same data, recipe, precision, device and options."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        dataset, recipe, precision = (run["settings"][name] for name in ("dataset", "recipe", "precision"))
        data = [dataset.get(name) for name in ("name", "split", "sha256")]  # older runs say no more
        key = [data, whole_recipe(recipe), precision, run["environment"]["device"], options(run)]
        found.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return list(found.values())


def options(run: dict[str, Any]) -> dict[str, Any]:
    """What else decides the result of a run, its time and its rounding."""
    said = run["settings"] | run["environment"]
    return {name: said.get(name, usual) for name, usual in OPTIONS.items()}


def environments(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what the runs were made, those that were resumed with each of what they were made with."""
    return [made_with for run in group for made_with in (*run.get("earlier_environments", ()), run["environment"])]


def short(commit: str | None) -> str:
    """Nine digits of a commit, and whether files differed from it."""
    digits, plus, changes = str(commit).partition("+")
    return f"{digits[:9]}{plus}{changes}"


def section(programme: str) -> str:
    """Tables and figures of a programme."""
    pictures = [f"![{SHOWN[name]}](figures/{programme}_{name}.png)" for name in drawn(programme)]
    if pictures and len(kinds := groups(finished(programme))) > 1:
        place = ("first", "second", "third")[kinds.index(largest(programme))]
        pictures = [f"The figures show the runs of the {place} of these tables.", *pictures]
    return "\n".join([tables(programme), *(f"{picture}\n" for picture in pictures)])


def tables(programme: str, *left_out: str) -> str:
    """A table of each group of runs without the columns left out, and the list of those that diverged."""
    runs = read(programme)
    if not runs:
        return "Not run yet.\n"
    parts = [f"{caption(group)}\n\n{table(group, *left_out)}" for group in groups(finished(programme))]
    planned = len(sweep.PROGRAMMES[programme])
    left = planned - len(runs)
    if failed := [run for run in runs if "failed" in run]:
        parts.append(
            "".join(f"- {title(run['name'])}, seed {run['settings']['seed']}: {run['failed']}\n" for run in failed)
        )
    if left:
        parts.append(f"{left} of the programme's {planned} runs {'has' if left == 1 else 'have'} not been made.\n")
    where = (RUNS / programme).relative_to(ROOT).as_posix()
    return "\n".join([*parts, f"Every epoch of every run, gradients by layer too: `{where}/`.\n"])


def with_and_without() -> str:
    """Accuracy with and without skips of each net that was trained both ways by one recipe, in `BOTH_WAYS`."""
    rows = []
    for programme in BOTH_WAYS:
        for group in groups(finished(programme)):
            by_name: dict[str, list[dict[str, Any]]] = {}
            for run in group:
                by_name.setdefault(run["name"], []).append(run)
            for name in [name for name in by_name if f"{name}_noskip" in by_name]:
                both = by_name[name], by_name[f"{name}_noskip"]
                cells = [
                    mean_and_std([run["epochs"][-1][f"{what}_accuracy_percent"] for run in same], 2)
                    for what in ("eval", "train")
                    for same in both
                ]
                settings = group[0]["settings"]
                rows.append([title(name), f"{settings['recipe']['epochs']}, {settings['precision']}", *cells])
    columns = [f"{what} %, {how} skips" for what in ("test", "training") for how in ("with", "without")]
    return markdown(["net", "epochs", *columns], rows, "llrrrr")


def caption(group: list[dict[str, Any]]) -> str:
    """What all runs of a table have in common."""
    settings, made_with = group[0]["settings"], environments(group)
    recipe, seeds = settings["recipe"], seeds_in_words((run["name"], run["settings"]["seed"]) for run in group)
    used = sorted({one["threads"] * one["processes"] for one in made_with})
    threads = f"{' or '.join(map(str, used))} thread{'s' * (used != [1])}"
    commits = sorted({short(one["commit"]) for one in made_with})
    torches = sorted({one["versions"]["torch"] for one in made_with})
    devices = dict.fromkeys(one["device"] for one in made_with)
    tta = "no test-time augmentation" if recipe["tta"] == "none" else f"test-time augmentation: {recipe['tta']}"
    usual = get_recipe(recipe["name"]).as_dict()
    said = ("name", "epochs", "batch_size", "tta")
    changed = [f"{name} {value}, " for name, value in recipe.items() if name not in said and value != usual[name]]
    others = {name: value for name, value in options(group[0]).items() if value != OPTIONS[name]}
    flags = {name: f"`--{name.replace('_', '-')}`, " for name, value in others.items() if value is True}
    made_so = [flags.get(name, f"{name} {value}, ") for name, value in others.items()]
    return (
        f"{settings['dataset']['name']}, {settings['dataset']['split']} set, recipe `{recipe['name']}` with "
        f"{recipe['epochs']} epochs of batch {recipe['batch_size']}, {''.join(changed)}{tta}, {settings['precision']}, "
        f"{''.join(made_so)}{seeds}, last epoch; "
        f"{' and '.join(devices)}, {threads}, torch {' and '.join(torches)}, commit {', '.join(commits)}."
    )


def table(group: list[dict[str, Any]], *left_out: str) -> str:
    """A row for each net: mean and sample standard deviation over its seeds, 95 % interval of the mean."""
    is_cifar10 = re.match(r"CIFAR-10\b", group[0]["settings"]["dataset"]["name"])
    header = ["net", "parameters", "accuracy, %", "95 % interval", "published, %", "loss", "training, s"]
    rows = []
    for name in dict.fromkeys(run["name"] for run in group):
        same = [run for run in group if run["name"] == name]
        accuracies = [run["epochs"][-1]["eval_accuracy_percent"] for run in same]
        row = {
            "net": title(name),
            "parameters": f"{same[0]['params']:,}",
            "accuracy, %": mean_and_std(accuracies, 2),
            "95 % interval": interval(accuracies),
            "published, %": published(name, group[0]["settings"]["recipe"]["name"]),
            "loss": mean_and_std([run["epochs"][-1]["eval_loss"] for run in same], 3),
            "training, s": mean_and_std([sum(epoch["seconds"] for epoch in run["epochs"]) for run in same], 0),
        }
        rows.append(row)
    if not is_cifar10:
        left_out = (*left_out, "published, %")
    kept = [name for name in header if name not in left_out and any(row[name] for row in rows)]  # none says nothing
    return markdown(kept, [[row[name] for name in kept] for row in rows], "l" + "r" * (len(kept) - 1))


def published(name: str, recipe: str) -> str:
    """What the source of the net and the recipe reports for the whole recipe."""
    nets = json.loads(PUBLISHED.read_text(encoding="utf-8"))["nets"]
    found = [net for net in nets if (net["name"], net["recipe"]) == (name, recipe)]
    return f"{found[0]['accuracy_percent']:.2f} ({found[0]['source']})" if found else ""


def finished(programme: str) -> list[dict[str, Any]]:
    """The runs of a programme that did not diverge."""
    return [run for run in read(programme) if "failed" not in run]


def largest(programme: str) -> list[dict[str, Any]]:
    """The finished runs of the table that has most of them."""
    return max(groups(finished(programme)), key=len, default=[])


def drawn(programme: str) -> list[str]:
    """The figures of a programme, where several nets can share axes."""
    runs = largest(programme)
    if len({run["name"] for run in runs}) < 2:
        return []
    has_depths = programme.startswith("degradation") and len(compared_depths(run["name"] for run in runs)) > 1
    return [name for name in SHOWN if name != "depths" or has_depths]


def compared_depths(names: Iterable[str]) -> set[int]:
    """The depths with runs of both kinds: the curve of one kind alone says nothing."""
    kinds: dict[bool, set[int]] = {True: set(), False: set()}
    for name in names:
        kinds[name.endswith("_noskip")].add(depth(name))
    return kinds[True] & kinds[False]


def depth(name: str) -> int:
    """Of a net called resnetN, with or without skips."""
    return int(re.sub(r"\D", "", name))


def draw(programme: str) -> dict[Path, bytes]:
    """The figures of a programme as PNG, each with the digest of the runs that it shows."""
    results = [Result(**run) for run in largest(programme)]
    with tempfile.TemporaryDirectory() as folder:
        draw_figures(ends(results) if "depths" in drawn(programme) else results, folder)
        if "depths" in drawn(programme):
            draw_depths(results, folder)
        return {path_of(programme, name): stamped(Path(folder) / f"{name}.png", programme) for name in drawn(programme)}


def ends(results: list[Result]) -> list[Result]:
    """Those of the least and the greatest compared depth: the curves of all in one picture cannot be told apart."""
    depths = compared_depths(result.name for result in results)
    return [result for result in results if depth(result.name) in (min(depths), max(depths))]


def path_of(programme: str, figure: str) -> Path:
    return FIGURES / f"{programme}_{figure}.png"


def digest(programme: str) -> str:
    """Of the numbers of all runs of a programme."""
    return hashlib.sha256(json.dumps(read(programme)).encode()).hexdigest()


def stamped(file: Path, programme: str) -> bytes:
    """The picture with the digest of its runs in it: pixels differ from one matplotlib to the next, numbers do not."""
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("Runs", digest(programme))
    with Image.open(file) as image:
        few_colours = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
        few_colours.save(buffer, format="png", pnginfo=about, optimize=True)
    return buffer.getvalue()


def is_current(programme: str, figure: str) -> bool:
    """Whether the picture is there and shows the runs as they are now."""
    path = path_of(programme, figure)
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Runs") == digest(programme)


def update_figures(check: bool) -> list[str]:
    """Draw what is out of date, or with `check` only name it."""
    stale = [name for name in sweep.PROGRAMMES if not all(is_current(name, figure) for figure in drawn(name))]
    for programme in [] if check else stale:
        for path, data in draw(programme).items():
            write_atomic(path, data)
    return [f"figures of {programme}" for programme in stale]


REGIONS: dict[str, Callable[[], str]] = {
    "runs-short": with_and_without,
    **{f"runs-{programme}": partial(section, programme) for programme in sweep.PROGRAMMES},
    # Where times are not explained, they would be compared.
    **{f"runs-{programme}-table": partial(tables, programme, "training, s") for programme in sweep.PROGRAMMES},
}
