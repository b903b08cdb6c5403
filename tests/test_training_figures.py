"""What is made of runs: experiments of several nets, tables and figures."""

from __future__ import annotations

import io
import json
import math
import sys
from bisect import bisect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from training_workers import RECIPE, tiny_dataset, tiny_fit, tiny_net

from resblocks.training import (
    PAPER,
    Dataset,
    Diverged,
    Recipe,
    Result,
    SomeDiverged,
    build_net,
    draw_figures,
    draw_surfaces,
    experiment,
    figures,
    fit,
    load_digits,
    results_table,
    run_experiment,
    run_variants,
)
from resblocks.training.figures import draw_depths
from resblocks.training.recipe import get_recipe, recipe_in_words
from resblocks.training.result import title


@pytest.mark.parametrize(
    ("variant", "params"), [("resnet18", 11_173_962), ("resnet18_noskip", 11_000_138), ("resnet20", 269_722)]
)
def test_variants_are_the_papers_nets(variant: str, params: int) -> None:
    images, labels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    data = Dataset("x", tuple("abcdefghij"), images, labels, images, labels)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in build_net(variant, data).parameters()) == params


@pytest.mark.parametrize(("suffix", "shortcuts"), [("", True), ("_noskip", False)])
def test_torchinit_draws_convolutions_as_torch_does(suffix: str, shortcuts: bool) -> None:
    usual, like_torch = (build_net(f"resnet20{start}{suffix}", tiny_dataset()) for start in ("", "_torchinit"))
    largest = [net.stages[0][0].branch.conv1.weight.abs().max() for net in (usual, like_torch)]
    assert largest[0] > 0.2
    assert largest[1] <= (16 * 9) ** -0.5
    assert like_torch.stages[0][0].skip is shortcuts


@pytest.mark.parametrize(("size", "kernel"), [((64, 64), 3), ((64, 65), 7)])
def test_images_of_at_most_64_pixels_get_the_stem_of_cifar(size: tuple[int, int], kernel: int) -> None:
    images, labels = torch.zeros(1, 3, *size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with torch.device("meta"):
        net = build_net("resnet18", Dataset("x", ("a", "b"), images, labels, images, labels))
    assert next(net.parameters()).shape[-1] == kernel


@pytest.mark.parametrize("seed", [2**70, -(2**63) - 1])
def test_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must be at least -2\*\*63 and below 2\*\*64, got {seed}"):
        build_net("resnet20", tiny_dataset(), seed)


def test_variants_start_from_the_weights_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets, seeds = [], []
    monkeypatch.setattr(experiment, "fit", lambda net, *args, seed, **more: nets.append(net) or seeds.append(seed))
    for seed in (0, 1):
        run_variants(["resnet20"], tiny_dataset(), RECIPE, out=tmp_path, seed=seed)
    assert seeds == [0, 1]
    assert not torch.equal(*(net.head.weight for net in nets))


def test_wrong_name_stops_before_the_first_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resnet19"):
        run_variants(["resnet20", "resnet19"], load_digits(), Recipe(), out=tmp_path)
    for wrong in (["resnet20", "resnet20"], []):
        with pytest.raises(ValueError, match="models must be at least one, and differ from each other"):
            run_variants(wrong, load_digits(), Recipe(), out=tmp_path)
    with pytest.raises(ValueError, match="small_maps needs a 3x3"):
        run_variants(["resnet18", "resnet20"], load_digits(), Recipe(), out=tmp_path, small_maps=True)
    assert list(tmp_path.iterdir()) == []


def test_net_that_diverges_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit_or_diverge(*args: Any, name: str, **options: Any) -> Result:
        if name == "resnet20":
            raise Diverged("the loss of resnet20 was NaN")
        return fit(*args, name=name, **options)

    monkeypatch.setattr(experiment, "fit", fit_or_diverge)
    names, recipe = ["resnet20", "resnet20_noskip"], replace(RECIPE, epochs=1)
    with pytest.raises(SomeDiverged, match="the loss of resnet20 was NaN"):
        run_experiment(names, tiny_dataset(), recipe, out=tmp_path, gradients=False, progress=False)
    assert "ResNet-20 without skips" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["name"] == "resnet20_noskip"


# Tables


def _made_up(name: str, seed: int, epochs: int = 3) -> Result:
    """A result with numbers of its own."""
    settings = {
        "dataset": {"name": "tiny", "split": "test"},
        "recipe": {"name": "paper"},
        "seed": seed,
        "precision": "float32",
    }
    record = {
        "train_loss": 1.0,
        "train_accuracy_percent": 50.0,
        "eval_loss": 1.25,
        "eval_accuracy_percent": 40.0,
        "seconds": 1.5,
    }
    layers = [{"name": f"layer{n}.weight", "mean_abs": 10.0**-n, "norm": 1.0} for n in range(1, 5)]
    layers.append({"name": "block.shortcut.conv.weight", "mean_abs": 1.0, "norm": 1.0})
    history = [
        {**record, "epoch": epoch, "eval_accuracy_percent": 40.0 + epoch + seed} for epoch in range(1, epochs + 1)
    ]
    return Result(
        name, 11_173_962, settings, {}, history, [{"epoch": epoch, "layers": layers} for epoch in range(epochs + 1)]
    )


def test_table_has_the_papers_numbers_beside_ours() -> None:
    table = results_table([_made_up(name, seed) for seed, name in enumerate(PAPER)], on_cifar10=True).splitlines()
    header = ["net", "accuracy (%)", "paper (%)", "loss", "parameters", "training (s)"]
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == header
    assert [cell.strip() for cell in table[4].split("|")[1:-1]] == [
        "ResNet-18",
        "45.00",
        "89.9",
        "1.2500",
        "11,173,962",
        "4.5",
    ]
    assert len({len(line) for line in table}) == 1
    assert "89.9" not in results_table([_made_up("resnet18", 0)], on_cifar10=False)


@pytest.mark.parametrize(
    ("section", "changed"),
    [("recipe", {"name": "paper", "lr": 0.3}), ("dataset", {"name": "tiny", "split": "test", "sha256": "other"})],
)
def test_runs_of_other_values_or_data_are_no_seeds_of_one_another(
    section: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    other = _made_up("resnet18", 1)
    other.settings[section] = changed
    with pytest.raises(ValueError, match="needs results of one data set and recipe, got tiny, recipe paper"):
        draw_figures([_made_up("resnet18", 0), other], tmp_path)


def test_recipe_is_named_with_what_was_changed() -> None:
    assert recipe_in_words(get_recipe("r26").as_dict()) == "r26"
    assert recipe_in_words(get_recipe("r26", lr=0.1, tta="flip").as_dict()) == "r26 (lr 0.1, tta flip)"
    assert recipe_in_words(Recipe(epochs=3).as_dict()) == "custom (epochs 3)"


def test_each_of_several_seeds_is_a_run_of_its_own(tmp_path: Path) -> None:
    options = {"device": "cpu", "precision": "float32", "progress": False, "gradients": False}
    several = run_variants(["resnet20"], tiny_dataset(), RECIPE, out=tmp_path / "two", seed=[0, 3], **options)
    assert [result.settings["seed"] for result in several] == [0, 3]
    assert several[0].loss != several[1].loss
    (alone,) = run_variants(["resnet20"], tiny_dataset(), RECIPE, out=tmp_path / "one", seed=[3], **options)
    assert alone.loss == several[1].loss
    assert (tmp_path / "two" / "resnet20" / "seed-3" / "result.json").exists()
    assert (tmp_path / "one" / "resnet20" / "result.json").exists()


@pytest.mark.parametrize(("seeds", "said"), [([], "none"), ([1, 1], "1, 1")])
def test_seeds_must_differ(seeds: list[int], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"seed must be one or several that differ, got {said}"):
        run_variants(["resnet20"], tiny_dataset(), RECIPE, out=tmp_path, seed=seeds)


def test_table_has_a_row_for_the_seeds_of_a_net() -> None:
    table = results_table([_made_up(name, seed) for seed in (0, 1, 3) for name in ("resnet18", "resnet18_noskip")])
    header, _, first, second = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert header == ["net", "accuracy (%)", "95 % interval", "loss", "parameters", "training (s)"]
    accuracy = ["44.33 ± 1.53 (n=3)", "40.54 to 48.13"]  # of 43, 44 and 46: 4.303 standard deviations / sqrt(3)
    assert first == ["ResNet-18", *accuracy, "1.2500 ± 0.0000 (n=3)", "11,173,962", "4.5 ± 0.0 (n=3)"]
    assert second[:3] == ["ResNet-18 without skips", *accuracy]


@pytest.mark.parametrize(
    ("name", "split", "shown"),
    [("CIFAR-10 (PNG)", "test", True), ("CIFAR-10", "validation", False), ("CIFAR-100", "test", False)],
)
def test_paper_is_shown_beside_its_test_set_alone(
    name: str,
    split: str,
    shown: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(experiment, "fit", lambda *args, **options: _made_up("resnet18", 0))
    monkeypatch.setattr(experiment, "draw_figures", lambda *args: [])
    run_experiment(["resnet18"], replace(tiny_dataset(), name=name, split=split), RECIPE, out=tmp_path)
    assert ("89.9" in capsys.readouterr().out) is shown


def test_table_is_printed_where_the_terminal_lacks_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "fit", lambda *args, seed, **options: _made_up("resnet20", seed))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii"))
    run_experiment(["resnet20"], tiny_dataset(), RECIPE, out=tmp_path, seed=[0, 1])
    sys.stdout.flush()
    assert b" ? " in shown.getvalue()


def test_names_are_no_formulas(tmp_path: Path) -> None:
    result = _made_up("us$_{x$", 0)
    result.settings["dataset"]["name"] = "$\\bad$"
    assert draw_figures([result], tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18_noskip", "ResNet-18 without skips"),
        ("resnet20_torchinit_noskip", "ResNet-20 from torch's draw without skips"),
        ("baseline_cnn_bn", "Baseline CNN with batch norm"),
        ("baseline_cnn_20", "Baseline CNN-20"),
        ("preact_resnet110", "Pre-activation ResNet-110"),
        ("wrn_28_10", "WRN-28-10"),
        ("resnext29_8x64d", "ResNeXt-29, 8x64d"),
        ("densenet_bc_100_12", "DenseNet-BC (L=100, k=12)"),
        ("densenet_40_12", "DenseNet (L=40, k=12)"),
        ("densenet121", "DenseNet-121"),
        ("mine", "mine"),
    ],
)
def test_titles_are_as_the_papers_write_them(name, words):
    assert title(name) == words


# Figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are drawn, by name, in place of files."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(figures, "_save", lambda figure, path, formats: kept.update({path.name: figure}) or [])
    return kept


def test_figures_show_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    original = figures._save

    def keep(figure: Any, path: Path, formats: Any) -> list[Path]:
        kept[path.name] = {
            axes.get_title(): [(line.get_label(), line.get_ydata().tolist()) for line in axes.lines]
            for axes in figure.axes
        }
        return original(figure, path, formats)

    monkeypatch.setattr(figures, "_save", keep)
    results = [_made_up(name, seed) for seed, name in enumerate(PAPER)]
    files = draw_figures(results, tmp_path, ("png", "svg"))
    assert [file.name for file in files[::2]] == [
        f"figure{name}.png"
        for name in ("1_training", "2_validation", "3_gradients", "4_training_all", "5_validation_all")
    ]
    for file in files[::2]:
        with Image.open(file) as image:
            assert image.size[0] > 1000
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10
    two, three = ["Baseline CNN", "ResNet-18"], ["Baseline CNN", "ResNet-18 without skips", "ResNet-18"]
    for name, labels in (("figure2_validation", two), ("figure5_validation_all", three)):
        lines = kept[name]["Accuracy, test set"]
        assert [label for label, _ in lines] == labels
        assert lines[-1][1] == [43.0, 44.0, 45.0]
    gradients = kept["figure3_gradients"]["At initialisation"]
    assert gradients[0] == ("Baseline CNN", [0.1, 0.01, 0.001, 0.0001])  # the projection is left out


def test_figures_show_mean_and_range_of_seeds(drawn: dict[str, Any], tmp_path: Path) -> None:
    draw_figures([_made_up("resnet18", seed) for seed in (0, 1, 5)], tmp_path)
    axes = drawn["figure2_validation"].axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[43.0, 44.0, 45.0]]
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [41.0, 48.0]
    with pytest.raises(ValueError, match=r"same epochs, resnet18 has \[2, 3\]"):
        draw_figures([_made_up("resnet18", 0), _made_up("resnet18", 1, epochs=2)], tmp_path)


@pytest.mark.parametrize(("smoothing", "loss"), [(0.0, "Cross-entropy loss"), (0.1, "Loss with smoothed labels")])
def test_figures_say_which_loss_they_show(smoothing: float, loss: str, drawn: dict[str, Any], tmp_path: Path) -> None:
    result = _made_up("resnet18", 0)
    result.settings["recipe"]["label_smoothing"] = smoothing
    draw_figures([result], tmp_path)
    assert drawn["figure1_training"].axes[1].get_title() == f"{loss}, training set"
    assert drawn["figure2_validation"].axes[1].get_title() == "Cross-entropy loss, test set"


def test_figure_of_gradients_shows_the_start_and_the_end(drawn: dict[str, Any], tmp_path: Path) -> None:
    result = _made_up("resnet18", 0)
    result.gradients[-1]["layers"] = [{"name": "layer1.weight", "mean_abs": 0.5, "norm": 1.0}]
    draw_figures([result], tmp_path)
    axes = drawn.pop("figure3_gradients").axes[1]
    assert (axes.get_title(), axes.lines[0].get_ydata().tolist()) == ("After 3 epochs", [0.5])
    result.gradients.pop()  # as of a run that lacks its end
    draw_figures([result], tmp_path)
    assert "figure3_gradients" not in drawn


def test_figures_need_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one finished epoch"):
        draw_figures([], tmp_path)


def test_net_that_trains_norms_alone_has_no_gradients_by_layer(tmp_path: Path) -> None:
    net = tiny_net()
    for layer in net.modules():
        if not isinstance(layer, nn.BatchNorm2d):
            for weight in layer.parameters(recurse=False):
                weight.requires_grad_(False)
    result = tiny_fit(tmp_path, net, gradients=True)
    assert [moment["layers"] for moment in result.gradients] == [[]] * (1 + len(result.epochs))
    assert "figure3_gradients.png" not in [path.name for path in draw_figures([result], tmp_path)]


def test_figure_of_depths_shows_the_last_epoch_of_each_kind(drawn: dict[str, Any], tmp_path: Path) -> None:
    names = ("resnet56", "resnet20", "resnet20_noskip", "resnet56_noskip")
    draw_depths([_made_up(name, 10 * at + seed) for at, name in enumerate(names) for seed in (0, 2)], tmp_path)
    axes = drawn["depths"].axes[1]
    assert axes.get_title() == "Accuracy, test set"
    assert {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines} == {
        "with skips": ([20, 56], [54.0, 44.0]),
        "without skips": ([20, 56], [64.0, 74.0]),
    }


def test_figure_of_depths_needs_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draw_depths needs results with at least one finished epoch each"):
        draw_depths([], tmp_path)


def test_surfaces_share_a_scale_and_lie_as_their_steps_say(drawn: dict[str, Any], tmp_path: Path) -> None:
    steps = [-1.0, 0.0, 1.0]
    low = {(one, other): 1.0 + one + 0.5 * (other + 1) for one in steps for other in steps}  # from 0 to 3
    high = {**{point: 10 * (1 + loss) for point, loss in low.items()}, (1.0, 1.0): math.inf}
    draw_surfaces({"flat $ground": low, "high over all that lies below": high}, tmp_path)
    first, second, bar = drawn["surfaces"].axes
    assert [axes.get_title() for axes in (first, second)] == [r"flat \$ground", "high over all that lies\nbelow"]
    filled, other = first.collections[0], second.collections[0]
    assert [(kind.norm.vmin, kind.norm.vmax) for kind in (filled, other)] == [(0.5, 35.0)] * 2
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0.5", "1.45", "4.18", "12.1", "35"]
    band = filled.get_paths()[bisect(list(filled.levels), 2.0) - 1].get_extents()  # where 1 + x + (y + 1) / 2 is 2
    assert -0.4 < band.x0 < 0.2  # x = 0 where y = 1, and x = 1 where y = -1: the first direction goes to the right
    assert (band.x1, band.y0, band.y1) == pytest.approx((1, -1, 1))


@pytest.mark.parametrize("losses", [[2.0] * 6, [1e-300, 1.0, 2.0, 3.0, 4.0, 1e300], [2.2, 2.5, 3.0, 3.5, 4.0, 4.2]])
def test_scale_has_five_numbers_and_panels_their_steps(
    losses: list[float], drawn: dict[str, Any], tmp_path: Path
) -> None:
    wide = dict(zip([(x, y) for x in (3, 1, 2) for y in (1, 0)], losses, strict=True))
    draw_surfaces(dict.fromkeys("abcde", wide), tmp_path)
    *panels, bar = drawn["surfaces"].axes
    assert len({tick.get_text() for tick in bar.get_yticklabels()}) >= (2 if len(set(losses)) == 1 else 5)
    assert [axes.get_subplotspec().rowspan.start for axes in panels] == [0, 0, 0, 0, 1]
    assert [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels] == [False, True, True, True, True]
    extent = panels[0].collections[0].get_datalim(panels[0].transData)
    assert (extent.x0, extent.x1, extent.y0, extent.y1) == pytest.approx((1, 3, 0, 1))


@pytest.mark.parametrize(
    ("surfaces", "message"),
    [
        ({}, "surfaces must map titles to surfaces, at least one, got {}"),
        ({"a": {(0, 0): 1.0}}, "surfaces must be grids of 2 x 2 points or more with a loss above zero, 'a' is none"),
        ({"b": {(x, y): 0.0 for x in (0, 1) for y in (0, 1)}}, "'b' is none"),
        ({"c": {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0}}, "'c' is none"),
        ({(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 2.0}, r"\(0, 0\) is none"),
    ],
)
def test_surfaces_that_cannot_be_drawn_are_named(surfaces: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        draw_surfaces(surfaces, tmp_path)


def test_nets_are_told_apart_and_look_the_same_in_all_figures(drawn: dict[str, Any], tmp_path: Path) -> None:
    depths = (20, 32, 44, 56, 110)
    draw_figures([_made_up(f"resnet{n}{plain}", 0) for n in depths for plain in ("", "_noskip")], tmp_path)
    looks = {}
    for name, figure in drawn.items():
        for line in figure.axes[0].lines:
            look = line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor()
            assert looks.setdefault(line.get_label(), look) == look, name
    assert len(set(looks.values())) == len(looks) == 10
    for n in depths:
        with_skips, plain = looks[f"ResNet-{n}"], looks[f"ResNet-{n} without skips"]
        assert with_skips[:2] == plain[:2]
        assert (with_skips[2], plain[2], plain[3]) == ("-", "--", "white")


def test_results_that_cannot_share_a_figure_are_named(tmp_path: Path) -> None:
    run = _made_up("resnet20", 0)
    other = replace(run, settings={**run.settings, "seed": 1, "recipe": {**run.settings["recipe"], "name": "r26"}})
    for draw in (draw_figures, draw_depths):
        with pytest.raises(ValueError, match="needs results of one data set and recipe, got"):
            draw([run, other], tmp_path)
        with pytest.raises(ValueError, match=r"needs each net and seed once, got \[\('resnet20', 0\)\] several times"):
            draw([run, run], tmp_path)
    with pytest.raises(ValueError, match=r"needs nets named resnetN or resnetN_noskip, got \['wrn_16_4'\]"):
        draw_depths([_made_up("wrn_16_4", 0)], tmp_path)


def test_batch_norm_is_given_to_the_baseline_alone() -> None:
    with pytest.raises(ValueError, match="_bn gives baseline_cnn its batch norm, and is for no other"):
        build_net("resnet20_bn", tiny_dataset())
