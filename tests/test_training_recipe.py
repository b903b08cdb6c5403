"""Recipes, schedules and augmentation: values by hand, and randomness that depends on (seed, step) alone."""

from __future__ import annotations

import json

import pytest
import torch

from resblocks.training import RECIPES, Recipe, augment, cutout, derive_seed, draw, get_recipe, normalise
from resblocks.training.augment import Draws, resize


def test_triangle_rises_to_a_fifth_of_the_run_and_falls_to_zero() -> None:
    recipe = Recipe(lr=0.2)
    rates = [recipe.lr_at(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[100] == pytest.approx(0.12)
    assert rates[200] == max(rates) == pytest.approx(0.2)
    assert rates[600] == pytest.approx(0.1)
    assert rates[999] == pytest.approx(0.2 / 800)


@pytest.mark.parametrize(
    ("name", "epoch", "lr"),
    [("he2015", 81, 0.1), ("he2015", 82, 0.01), ("he2015", 123, 0.001)]
    + [("wrn", 59, 0.1), ("wrn", 60, 0.02), ("wrn", 120, 0.004), ("wrn", 160, 0.0008)]
    + [("resnext", 149, 0.1), ("resnext", 150, 0.01), ("resnext", 225, 0.001), ("densenet", 225, 0.001)],
)
def test_steps_fall_at_the_papers_epochs(name: str, epoch: int, lr: float) -> None:
    recipe = get_recipe(name)
    assert recipe.lr_at(epoch * 100, recipe.epochs * 100) == pytest.approx(lr)


def test_cosine_and_constant() -> None:
    cosine = Recipe(schedule="cosine", lr=1.0, warmup=0.0)
    assert [cosine.lr_at(step, 4) for step in range(4)] == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    constant = Recipe(schedule="constant", lr=1.0, warmup=0.5, warmup_start=0.0)
    assert [constant.lr_at(step, 4) for step in range(4)] == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "milestones", "after"),
    [("cosine", (), [1, 0.853553, 0.5, 0.146447]), ("steps", (0.75,), [1, 1, 0.1, 0.1])],
)
def test_warm_up_comes_before_every_schedule(schedule: str, milestones: tuple[float, ...], after: list[float]) -> None:
    recipe = Recipe(schedule=schedule, milestones=milestones, lr=1.0, warmup=0.5, warmup_start=0.5)
    rates = [recipe.lr_at(step, 8) for step in range(8)]
    assert rates == pytest.approx([0.5, 0.625, 0.75, 0.875, *after], abs=1e-6)


def test_scale_grows_by_quarters_to_one() -> None:
    recipe = Recipe(start_scale=0.5, full_scale_at=0.8)
    scales = [recipe.scale_at(step, 100) for step in range(100)]
    assert scales == [0.5] * 40 + [0.75] * 40 + [1.0] * 20
    assert {Recipe().scale_at(step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "paper",
            {
                "epochs": 10,
                "batch_size": 500,
                "lr": 0.2,
                "weight_decay": 5e-4,
                "nesterov": True,
                "cutout": 0,
                "schedule": "triangular",
            },
        ),
        ("r10", {"epochs": 10, "batch_size": 128, "lr": 0.1, "start_scale": 0.5, "cutout": 0}),
        (
            "r26",
            {
                "epochs": 26,
                "batch_size": 500,
                "lr": 0.2,
                "cutout": 12,
                "crop": 4,
                "padding": "reflect",
                "label_smoothing": 0,
            },
        ),
        ("r80", {"epochs": 80, "cutout": 12}),
        ("he2015", {"epochs": 164, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "nesterov": False}),
        ("wrn", {"epochs": 200, "batch_size": 128, "weight_decay": 5e-4, "gamma": 0.2, "nesterov": True}),
        ("resnext", {"epochs": 300, "batch_size": 128, "weight_decay": 5e-4}),
        ("densenet", {"epochs": 300, "batch_size": 64, "weight_decay": 1e-4}),
        ("cutout200", {"epochs": 200, "cutout": 16, "gamma": 0.2}),
        ("digits", {"flip": False}),
    ],
)
def test_recipes_are_those_of_their_sources(name: str, expected: dict[str, object]) -> None:
    recipe = RECIPES[name]
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.tta == "none"


def test_recipe_survives_json() -> None:
    for name in RECIPES:
        recipe = get_recipe(name, lr=0.3, cutout=5)
        values = json.loads(json.dumps(recipe.as_dict()))
        assert get_recipe(**values) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"gamma": float("inf")}, "gamma must be at least 0 and finite, got inf"),
        ({"flip": 1}, "flip must be True or False, got 1"),
        ({"lr": "0.1"}, "lr must be an integer or a float, got '0.1'"),
        ({"lr": True}, "lr must be an integer or a float, got True"),
        ({"momentum": torch.tensor(0.9)}, r"momentum must be an integer or a float, got tensor\(0.9"),
        ({"schedule": "steps", "milestones": (0.5, "x")}, r"milestones\[1\] must be an integer or a float, got 'x'"),
        ({"schedule": ["steps"]}, r"schedule must be a str, got \['steps'\]"),
        ({"milestones": 0.5}, "milestones must be a list or another sequence, got 0.5"),
        ({"epochs": 2.5}, "epochs must be an integer of at least 1, got 2.5"),
        ({"crop": 1.5}, "crop must be an integer of at least 0, got 1.5"),
        ({"batch_size": -1}, "batch_size must be an integer of at least 1, got -1"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"flip": False, "alternate_flip": True}, "alternate_flip must be False where flip is, got True"),
        ({"momentum": 0.0}, "nesterov must be False where momentum is 0, got True"),
        ({"schedule": "linear"}, "schedule must be one of triangular, steps, cosine, constant, got 'linear'"),
        ({"schedule": "steps"}, r"milestones must be given with schedule=steps, and only then, got \(\)"),
        ({"milestones": [0.5]}, "milestones must be given with schedule=steps"),
        ({"schedule": "steps", "milestones": [0.7, 0.5]}, "milestones must be rising fractions"),
        ({"start_scale": 0.6}, "start_scale must be a multiple of a quarter, got 0.6"),
        ({"start_scale": 0.0}, r"start_scale must be in \(0, 1\], got 0.0"),
        ({"full_scale_at": 1.5}, r"full_scale_at must be in \(0, 1\], got 1.5"),
        ({"padding": "edge"}, "padding must be reflect or zeros, got 'edge'"),
        ({"tta": "crop"}, "tta must be none or flip, got 'crop'"),
        ({"batchsize": 3}, "a recipe has no option 'batchsize'; it has alternate_flip, batch_size"),
    ],
)
def test_wrong_values_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_recipe("paper", **overrides)


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="no recipe is named 'r27'; there are paper, r10"):
        get_recipe("r27")


# Augmentation

PLAIN = Recipe(crop=0, flip=False)
ZERO_MEAN, UNIT_STD = torch.zeros(1), torch.full((1,), 1 / 255)  # normalise then leaves the bytes as they are


def _images(count: int = 64, size: int = 8) -> torch.Tensor:
    return torch.arange(count * size * size).remainder(251).add(1).to(torch.uint8).view(count, 1, size, size)


def _draws(**values: list[int]) -> Draws:
    count = len(next(iter(values.values())))
    rest = {name: torch.tensor(values.get(name, [0] * count)) for name in Draws.__dataclass_fields__}
    return Draws(**{**rest, "mirrored": rest["mirrored"].bool()})


def test_no_augmentation_takes_the_rows_as_they_are() -> None:
    images, rows = _images(), torch.tensor([5, 0, 5])
    out = augment(images, rows, draw(PLAIN, 3, 8, 8, seed=0, step=0), PLAIN, ZERO_MEAN, UNIT_STD)
    assert torch.equal(out, images[rows].float())


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "reflect"), ("zeros", "constant")])
@pytest.mark.parametrize("flipped", [False, True])
def test_crop_and_flip_equal_torchs_padding(padding: str, mode: str, flipped: bool) -> None:
    recipe, images = Recipe(crop=3, padding=padding), _images(49)[..., :6]  # no squares
    top, left = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    draws = _draws(top=top.flatten().tolist(), left=left.flatten().tolist(), mirrored=[int(flipped)] * 49)
    out = augment(images, torch.arange(49), draws, recipe, ZERO_MEAN, UNIT_STD)
    padded = torch.nn.functional.pad(images.float(), (3, 3, 3, 3), mode=mode)
    for index in range(49):
        y, x = int(top.flatten()[index]), int(left.flatten()[index])
        window = padded[index, :, y : y + 8, x : x + 6]
        assert torch.equal(out[index], window.flip(2) if flipped else window)


def test_cutout_is_one_full_square_per_image() -> None:
    recipe = Recipe(crop=0, flip=False, cutout=5)
    draws = draw(recipe, 500, 8, 8, seed=0, step=0)
    out = cutout(torch.ones(500, 2, 8, 8), draws.cutout_top, draws.cutout_left, 5)
    assert ((out == 0).sum((1, 2, 3)) == 2 * 25).all()
    for image, top, left in zip(out[:20], draws.cutout_top[:20], draws.cutout_left[:20], strict=True):
        assert (image[:, top : top + 5, left : left + 5] == 0).all()
    assert set(draws.cutout_top.tolist()) == set(draws.cutout_left.tolist()) == set(range(4))  # every place that fits


def test_cutout_fills_with_the_mean() -> None:
    mean, std = torch.tensor([0.3]), torch.tensor([0.5])
    recipe = Recipe(crop=0, flip=False, cutout=8)
    out = augment(_images(2), torch.arange(2), draw(recipe, 2, 8, 8, seed=0, step=0), recipe, mean, std)
    assert (out == 0).all()


def test_resize_to_half_keeps_the_mean_and_what_is_even() -> None:
    images = torch.rand(3, 2, 8, 12, dtype=torch.float64)
    half = resize(images, 0.5)
    assert half.shape == (3, 2, 4, 6)
    assert (half.mean() - images.mean()).abs() < 0.02
    assert torch.allclose(resize(torch.full((1, 1, 8, 8), 0.3), 0.75), torch.tensor(0.3))
    assert resize(images, 1.0) is images


def test_resize_averages_over_all_that_falls_into_a_pixel() -> None:
    stripes = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(8).expand(1, 1, 32, 32)
    assert (resize(stripes, 0.25)[..., 1:-1] - 0.25).abs().max() < 0.01


def test_draws_cover_the_window_and_flip_half() -> None:
    draws = draw(Recipe(crop=2), 4000, 8, 8, seed=0, step=0)
    assert set(draws.top.tolist()) == set(draws.left.tolist()) == set(range(5))
    assert 0.46 < draws.mirrored.float().mean() < 0.54
    assert not draw(Recipe(flip=False), 100, 8, 8, seed=0, step=0).mirrored.any()
    assert not torch.equal(draws.top, draws.left)


def test_draws_depend_on_seed_and_step_only() -> None:
    def same(a: Draws, b: Draws) -> bool:
        return all(torch.equal(getattr(a, name), getattr(b, name)) for name in Draws.__dataclass_fields__)

    recipe = Recipe(cutout=3)
    first = draw(recipe, 50, 8, 8, seed=1, step=2)
    torch.rand(5)
    assert same(first, draw(recipe, 50, 8, 8, seed=1, step=2))
    assert not same(first, draw(recipe, 50, 8, 8, seed=1, step=3))
    assert not same(first, draw(recipe, 50, 8, 8, seed=2, step=2))


def test_normalised_data_have_mean_zero_and_deviation_one() -> None:
    images = _images()
    mean, std = images.double().mean() / 255, images.double().std(correction=0) / 255
    out = normalise(images, mean.float().view(1), std.float().view(1))
    assert out.mean().abs() < 1e-5
    assert (out.std(correction=0) - 1).abs() < 1e-5


@pytest.mark.parametrize(
    ("recipe", "size", "message"),
    [
        (Recipe(cutout=9), (8, 8), "cutout must fit into the images of 8x8 pixels, got 9"),
        (Recipe(cutout=7), (6, 8), "cutout must fit into the images of 6x8 pixels, got 7"),
        (Recipe(cutout=7), (8, 6), "cutout must fit into the images of 8x6 pixels, got 7"),
        (Recipe(crop=8), (8, 8), "crop must be smaller than the images of 8x8 pixels"),
    ],
)
def test_augmentation_that_does_not_fit_is_refused(recipe: Recipe, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(recipe, 1, *size, seed=0, step=0)


def test_seeds_of_near_inputs_are_unrelated() -> None:
    seeds = {derive_seed(purpose, a, b) for purpose in ("order", "step") for a in range(20) for b in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("step", 1, 23) != derive_seed("step", 12, 3)


def test_another_schedule_leaves_the_milestones_of_the_recipe() -> None:
    assert get_recipe("he2015").milestones != ()
    assert get_recipe("he2015", schedule="cosine").milestones == ()
