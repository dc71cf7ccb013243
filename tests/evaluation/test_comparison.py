"""Comparing runs: what counts, what is refused, and what may be claimed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.evaluation import Comparison, Results, Sample, compare, score

QUICK: dict[str, Any] = {"resamples": 999}
CONFIG = {"dtype": "float32", "preprocessing": "square 224", "options": {"prompt": "upstream"}}


def make(
    rows: list[dict[str, Any]],
    name: str = "a",
    path: Path | None = None,
    lower_is_better: tuple[str, ...] = (),
    sets: list[dict[str, Any]] | None = None,
    **provenance: Any,
) -> Results:
    """Results in memory, with what run.json says of metrics."""
    labels = dict.fromkeys(row["metric"] for row in rows)
    made = {
        label: {**provenance, "card": {"higher_is_better": label not in lower_is_better}}
        for label in labels
    }
    results = Results.from_rows(rows, name, metrics=made)
    results.path, results.sets = path, sets or []
    return results


def row(prompt_id: str, score: float, *, seed: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of Results.to_pandas(); `more` replaces columns, and settings of the config."""
    settings = {name: more.pop(name) for name in ("dtype", "preprocessing", "options") if name in more}
    config = json.dumps({**CONFIG, **settings})
    made = {"weights": "w" * 64, "metric_version": "0.1.0", "config": config, **more}
    given = f"{prompt_id}-{seed or 0}"
    return {
        "id": given,
        "prompt_id": prompt_id,
        "seed": seed,
        "category": None,
        "prompt": f"a picture of {prompt_id}",
        "image": f"{given}.png",
        "image_sha256": None,
        "metric": "pickscore",
        "score": score,
        "error_type": None,
        "error": None,
        "fingerprint": str(sorted((name, str(made[name])) for name in ("weights", "config"))),
        "device": "cpu",
        "torch": "2.9",
        **made,
    }


def run(scores: Mapping[str, Any], name: str = "a", **more: Any) -> Results:
    """A run with a score, or a list of scores of seeds "0", "1", ..., for each prompt."""
    rows = []
    for prompt, values in scores.items():
        for seed, value in enumerate(values if isinstance(values, list) else [values]):
            rows.append(row(prompt, value, seed=str(seed), **more))
    return make(rows, name)


def many(loc: float = 0.0, prompts: int = 60, seed: int = 0, spread: float = 1.0) -> dict[str, float]:
    """Scores that differ from those of another seed by noise."""
    difficulty = np.random.default_rng(1).normal(scale=3, size=prompts)
    noise = np.random.default_rng(seed).normal(loc=loc, scale=spread, size=prompts)
    return {f"p{index:03d}": float(value) for index, value in enumerate(difficulty + noise)}


def overall(comparison: Comparison) -> Any:
    (found,) = (each for each in comparison.differences if each.category is None)
    return found


def test_checkpoints_from_pictures_to_a_verdict(tmp_path: Path) -> None:
    colors = ["red", "green", "blue", "yellow"]
    prompts = [f"a {color} {shape}" for color in colors for shape in ("circle", "square")]
    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
    for checkpoint, shift in (("good", 0), ("colorblind", 1)):
        samples = []
        for prompt in prompts:
            _, color, shape = prompt.split()
            drawn = colors[(colors.index(color) + shift) % len(colors)]
            samples.append(Sample(id=prompt, prompt=prompt, image=draw_shape(shape, drawn)))
        score(samples, {"shapes": metric}, out=tmp_path / checkpoint, progress=False)
    comparison = compare(tmp_path / "good", str(tmp_path / "colorblind"), **QUICK)
    assert comparison.names == ("good", "colorblind")
    assert comparison.verdict.startswith("colorblind is worse than good on shapes (-")
    assert overall(comparison).win_rate.value == 0
    assert comparison.unpaired.rows == ()
    with pytest.raises(FileNotFoundError):
        compare(tmp_path / "good", tmp_path / "bad")


def test_prompts_are_paired_after_averaging_over_seeds() -> None:
    first = run({"p1": [1.0, 3.0], "p2": [10.0, 10.0], "p3": [0.0, 2.0]}, "before")
    second = run({"p1": [2.0, 4.0], "p2": [9.0, 9.0], "p3": [2.0, 6.0]}, "after")
    found = overall(compare(first, second, **QUICK))
    assert (found.first, found.second, found.metric) == ("before", "after", "pickscore")
    assert found.mean_first == pytest.approx((2 + 10 + 1) / 3)
    assert found.mean_second == pytest.approx((3 + 9 + 4) / 3)
    assert found.difference.value == pytest.approx((1 - 1 + 3) / 3)
    assert (found.difference.prompts, found.difference.images) == (3, 6)
    assert found.effect == pytest.approx(1 / 2)
    assert found.win_rate.value == pytest.approx(2 / 3)
    assert found.p == pytest.approx(6 / 8)  # ranks 1.5, -1.5, 3: six of eight sums are as far out


def test_a_real_difference_is_claimed_and_noise_is_not() -> None:
    before = run(many(), "before")
    better = compare(before, run(many(0.8, seed=2), "after"), **QUICK)
    assert overall(better).better == "after"
    assert better.verdict.startswith("after is better than before on pickscore (+0.")
    assert "95 % interval" in better.verdict and "60 prompts" in better.verdict
    worse = compare(before, run(many(-0.8, seed=2), "after"), **QUICK)
    assert overall(worse).better == "before"
    assert worse.verdict.startswith("after is worse than before on pickscore (-0.")
    same = compare(before, run(many(seed=2), "after"), **QUICK)
    assert overall(same).better is None
    assert same.verdict.startswith("no difference between before and after can be claimed on pickscore")


def test_a_few_prompts_are_too_few_to_tell() -> None:
    for prompts in (1, 5):
        found = compare(run(many(prompts=prompts)), run(many(9, prompts, 2), "b"), **QUICK)
        assert overall(found).better is None
        assert f"{prompts} prompt" in found.verdict and "too few to tell" in found.verdict
    one = overall(compare(run({"p": 1.0}), run({"p": 2.0}, "b"), **QUICK))
    assert (one.difference.value, one.difference.low, one.difference.high) == (1, None, None)
    assert (one.p, one.p_holm, one.effect, one.win_rate.value) == (None, None, None, 1)
    enough = compare(run(many(prompts=6)), run(many(9, 6, 2), "b"), **QUICK)
    assert overall(enough).better == "b"


def test_equal_runs_and_equal_shifts() -> None:
    same = compare(run(many()), run(many(), "b"), **QUICK)
    found = overall(same)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.p, found.win_rate.value, found.effect, found.better) == (1, 0.5, None, None)
    assert any("all 60 prompts are equal" in note for note in same.notes)
    shifted = {prompt: float(index) for index, prompt in enumerate(many())}
    up = compare(
        run(shifted), run({prompt: score + 1 for prompt, score in shifted.items()}, "b"), **QUICK
    )
    assert overall(up).better == "b"
    assert any("differ by the same 1" in note for note in up.notes)


def pictures(scores: Mapping[str, float], name: str, noise: float = 0.0, **more: Any) -> Results:
    """A run with three pictures for each prompt, whose content follows from the prompt and the seed."""
    generator = np.random.default_rng(len(name))
    rows = [
        row(
            prompt,
            score + seed / 7 + noise * generator.normal(),
            seed=str(seed),
            **{"image_sha256": f"sha of {prompt} {seed}", **more},
        )
        for prompt, score in scores.items()
        for seed in range(3)
    ]
    return make(rows, name)


def test_the_same_picture_has_the_same_score() -> None:
    scores = many()
    first, second = pictures(scores, "a"), pictures(scores, "bb", noise=1e-6)
    same = compare(first, second, **QUICK)
    found = overall(same)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.p, found.win_rate.value, found.better) == (1, 0.5, None)
    assert any("all 60 prompts are equal" in note for note in same.notes)
    (told,) = (note for note in same.notes if "first score of the same picture" in note)
    assert told.startswith("pickscore: 180 scores of bb count as") and "e-06" in told
    assert set(same.pairs("pickscore")["gain"]) == {0}
    assert not any("first score" in note for note in compare(first, first, **QUICK).notes)
    # What is not known to be the same is compared as it is.
    source = {"sources": ["source.png"]}
    for of_first, of_second in (
        ({"image_sha256": None}, {"image_sha256": None}),
        ({"image_sha256": ""}, {"image_sha256": ""}),
        ({"fingerprint": None}, {"fingerprint": None}),
        (source, source),
        ({**source, "key": "a"}, {**source, "key": "b"}),
    ):
        first, second = pictures(scores, "a", **of_first), pictures(scores, "bb", 1e-6, **of_second)
        assert 0 < abs(overall(compare(first, second, **QUICK)).difference.value) < 1e-5, of_first
    changed = pictures(scores, "bb", noise=1e-6, prompt="another")
    other_prompt = compare(pictures(scores, "a"), changed, allow="prompt", **QUICK)
    assert overall(other_prompt).difference.value != 0
    edits = [
        pictures(scores, name, noise, sources=[f"{name}/source.png"], key="content")
        for name, noise in (("a", 0.0), ("bb", 1e-6))
    ]
    assert overall(compare(*edits, **QUICK)).p == 1


def test_several_pictures_of_one_seed_are_told() -> None:
    first = make([row("p1", 1.0, seed="7"), row("p1", 2.0, seed="7", id="x"), row("p2", 1.0, seed="7")])
    second = make([row("p1", 1.0, seed="7"), row("p2", 1.0, seed="7")], "b")
    notes = compare(first, second, **QUICK).notes
    (told,) = (note for note in notes if "several pictures" in note)
    assert told.startswith("a: 1 prompt has several pictures of one seed") and "seed 7 of 'p1'" in told
    two = compare(run({"p1": [1.0, 2.0]}), run({"p1": [1.0, 2.0]}, "b"), **QUICK)
    assert not any("several pictures" in note for note in two.notes)


def test_prompts_with_other_ids_pair_by_their_texts() -> None:
    def of(ids: Mapping[str, str], name: str, **more: Any) -> Results:
        rows = [row(ids.get(p, p), s, prompt=p, id=p, seed="0", **more) for p, s in many().items()]
        return make(rows, name)

    geneval = {prompt: f"{number:05}" for number, prompt in enumerate(many())}
    first, second = of({}, "a"), of(geneval, "b")
    with pytest.raises(
        ValueError, match=r"pass pair_by=\('prompt', 'seed'\) to pair by text: 60 prompts"
    ):
        compare(first, second, **QUICK)
    for pair_by in (("prompt", "seed"), ("prompt",)):
        found = compare(first, second, pair_by=pair_by, **QUICK)
        assert overall(found).difference.prompts == 60
        assert not any("by text" in note for note in found.notes)
    some = compare(first, of({"p000": "00000"}, "b"), **QUICK)
    assert overall(some).difference.prompts == 59
    (told,) = (note for note in some.notes if "by text" in note)
    assert "1 prompt of the same text" in told and "'p000' in a and '00000' in b" in told
    # The same words for another picture are another prompt.
    with pytest.raises(ValueError, match="compare runs over the same prompts"):
        compare(of({}, "a", sources=["x.png"]), of(geneval, "b", sources=["y.png"]), **QUICK)


def test_a_run_against_itself_is_told(tmp_path: Path) -> None:
    rows = [row("p", 1.0, image_sha256="f" * 64)]
    one, other = make(rows, "a", tmp_path / "a"), make(rows, "b", tmp_path / "x" / ".." / "a")
    notes = compare(one, other, **QUICK).notes
    assert [note for note in notes if "the same run" in note] == ["b is the same run as a"]
    assert not any("very same pictures" in note for note in notes)
    twice = make(rows, "b")
    notes = compare(make(rows), twice, twice, **QUICK).notes
    assert [note for note in notes if "the same run" in note] == ["b (2) is the same run as b"]


def test_the_direction_of_the_metric_decides_who_wins() -> None:
    rows = [
        [row(prompt, score, metric="distance") for prompt, score in many(loc, seed=seed).items()]
        for loc, seed in ((0, 0), (-0.8, 2))
    ]
    first, second = (
        make(own, name, lower_is_better=("distance",)) for own, name in zip(rows, "ab", strict=True)
    )
    comparison = compare(first, second, **QUICK)
    found = overall(comparison)
    assert found.difference.value < 0 and found.effect < 0
    assert found.better == "b"
    assert found.win_rate.value > 0.5
    pairs = comparison.pairs("distance")
    assert pairs["gain"].tolist() == (pairs["score_first"] - pairs["score_second"]).tolist()
    contrary = make(rows[1], "b")
    with pytest.raises(ValueError, match="higher_is_better of distance"):
        compare(first, contrary, **QUICK)


def test_a_mean_that_outliers_make_is_no_claim() -> None:
    # The mean rises, most prompts fall: two tests that disagree about who is better.
    first = run({f"p{index:03d}": 0.0 for index in range(100)})
    second = run(
        {f"p{index:03d}": -1.0 - index / 1e3 if index < 80 else 20.0 for index in range(100)}, "b"
    )
    found = overall(compare(first, second, **QUICK))
    assert found.difference.low > 0 and found.p_holm < 0.05 and found.win_rate.value < 0.5
    assert found.better is None
    # Most prompts rise a little, some fall a lot: the mean may be the same.
    second = run(
        {f"p{index:03d}": 1.0 + index / 1e3 if index < 80 else -4.0 for index in range(100)}, "b"
    )
    found = overall(compare(first, second, **QUICK))
    assert found.difference.low < 0 < found.difference.high and found.p_holm < 0.05
    assert found.win_rate.value == pytest.approx(0.8)
    assert found.better is None


def test_a_comparison_mirrors_and_repeats_whatever_the_order_of_rows() -> None:
    scores, others = many(prompts=30), many(0.3, 30, seed=2)
    there = overall(compare(run(scores), run(others, "b"), **QUICK))
    again = run(dict(reversed(others.items())), "b")
    assert overall(compare(run(scores), again, **QUICK)) == there
    back = overall(compare(run(others, "b"), run(scores), **QUICK))
    assert (back.difference.value, back.effect) == pytest.approx(
        (-there.difference.value, -there.effect)
    )
    ends = (-there.difference.high, -there.difference.low)
    assert (back.difference.low, back.difference.high) == pytest.approx(ends)
    assert back.win_rate.value == pytest.approx(1 - there.win_rate.value)
    assert (back.p, back.better) == (there.p, there.better)
    assert overall(compare(run(scores), run(others, "b"), seed=1, **QUICK)) != there


def test_seeds_that_only_one_run_has_do_not_count() -> None:
    first = run({"p1": [1.0, 2.0, 99.0], "p2": [5.0]})
    second = run({"p1": [2.0, 3.0], "p2": [6.0]}, "b")
    comparison = compare(first, second, **QUICK)
    assert overall(comparison).difference.value == pytest.approx(1)
    assert overall(comparison).difference.images == 3
    assert comparison.unpaired.records() == [
        {
            "metric": "pickscore",
            "run": "a",
            "why": "its seed is not in b",
            "images": 1,
            "prompts": 1,
            "such as": "p1-2",
        }
    ]
    everything = overall(compare(first, second, pair_by=("prompt_id",), **QUICK))
    assert everything.mean_first == pytest.approx((34 + 5) / 2)


def test_prompts_without_seeds_pair_as_they_are() -> None:
    first = make([row("p1", 1.0), row("p1", 3.0, id="x"), row("p2", 5.0, seed="7")])
    second = make([row("p1", 4.0, seed="0"), row("p2", 7.0, seed="7"), row("p2", 99.0, seed="8")], "b")
    found = overall(compare(first, second, **QUICK))
    assert (found.mean_first, found.mean_second) == pytest.approx(((2 + 5) / 2, (4 + 7) / 2))


def test_pictures_without_a_score_are_left_out_with_their_partners_and_told() -> None:
    nan = float("nan")
    first = run({"p1": [1.0, 2.0], "p2": [3.0, 3.0], "p3": [5.0, 5.0], "p4": [0.0]})
    second = run(
        {"p1": [2.0, nan], "p2": [4.0, 4.0], "p3": [nan, nan], "p5": [0.0]}, "b", error_type="ImageError"
    )
    comparison = compare(first, second, **QUICK)
    assert overall(comparison).difference.value == pytest.approx(1)
    assert overall(comparison).difference.prompts == 2
    told = {(entry["run"], entry["why"]): entry["images"] for entry in comparison.unpaired.records()}
    assert told == {
        ("a", "its prompt is not in b"): 1,
        ("a", "no score in b"): 3,
        ("b", "its prompt is not in a"): 1,
        ("b", "no score: ImageError"): 3,
    }
    assert "Left out" in str(comparison)


def test_a_metric_without_any_pair_is_not_a_zero() -> None:
    rows = [
        [row("p1", 1.0), row("p1", score, metric="clip", error_type="ImageError")]
        for score in (1.0, float("nan"))
    ]
    comparison = compare(make(rows[0]), make(rows[1], "b"), **QUICK)
    clip = next(each for each in comparison.differences if each.metric == "clip")
    assert (clip.difference.value, clip.mean_first, clip.p, clip.better) == (None, None, None, None)
    assert "clip (no scores of the same prompts)" in comparison.verdict


def test_scores_that_were_made_differently_are_refused_field_by_field() -> None:
    scores = many(prompts=8)
    first = run(scores, "before")
    second = run(scores, "after", dtype="bfloat16", options={"prompt": "hpsv2"})
    with pytest.raises(ValueError) as error:
        compare(first, second, **QUICK)
    message = str(error.value)
    assert "allow=('dtype', 'options.prompt')" in message
    assert "pickscore: dtype is float32 in 'before', bfloat16 in 'after'" in message
    assert "pickscore: options.prompt is upstream in 'before', hpsv2 in 'after'" in message
    assert "weights" not in message
    with pytest.raises(ValueError, match=r"options\.prompt is upstream") as partly:
        compare(first, second, allow=("dtype",), **QUICK)
    assert "dtype is" not in str(partly.value)
    for allow in (("dtype", "options"), ("dtype", "options.prompt")):
        allowed = compare(first, second, allow=allow, **QUICK)
        assert "with different dtype and options.prompt" in allowed.verdict
        assert sum(note.startswith("allowed to differ: pickscore: ") for note in allowed.notes) == 2


def test_every_field_that_changes_a_score_is_compared() -> None:
    scores = {"p1": 1.0, "p2": 2.0}
    for field, value in (
        ("weights", "v" * 64),
        ("weights", None),
        ("dtype", "float16"),
        ("preprocessing", "bicubic"),
        ("options", {}),
        ("options", {"prompt": "upstream", "more": "1"}),
        ("fingerprint", "another"),
    ):
        with pytest.raises(ValueError, match=field):
            compare(run(scores), run(scores, "b", **{field: value}), **QUICK)
    # Nothing is known of what made these.
    bare = [make([{"id": "1", "prompt_id": "p", "metric": "clip", "score": 1.0}], name) for name in "ab"]
    assert any("its weights are not known" in note for note in compare(*bare, **QUICK).notes)


def test_what_only_the_provenance_tells_is_compared() -> None:
    judges = [
        make(
            [row("p1", 1.0, weights=None, fingerprint=name)],
            name,
            engine="Server",
            identity={"model": name},
        )
        for name in "ab"
    ]
    with pytest.raises(ValueError, match=r"pickscore: identity\.model is a in 'a', b in 'b'"):
        compare(*judges, **QUICK)
    assert any("weights are not known" in note for note in compare(judges[0], judges[0], **QUICK).notes)
    # A network in memory has no file, and its fingerprint tells its weights.
    networks = [make([row("p1", 1.0, weights=None)], name) for name in "ab"]
    assert not any("weights are not known" in note for note in compare(*networks, **QUICK).notes)


def test_what_does_not_change_a_score_may_differ() -> None:
    first, second = (
        make(
            [row("p1", 1.0, options={"prompt": "upstream", "num_workers": count}, fingerprint="same")],
            name,
            version=f"0.{count}",
            weight_files=[f"/{name}/model.safetensors"],
        )
        for name, count in (("a", "1"), ("b", "2"))
    )
    assert compare(first, second, **QUICK).notes == ()


def test_another_version_or_machine_is_a_note() -> None:
    scores = {"p1": 1.0, "p2": 2.0}
    made = {"metric_version": "0.2.0", "torch": "3.0", "device": "cuda:0"}
    comparison = compare(run(scores), run(scores, "b", **made), **QUICK)
    assert "another version of this package: 0.1.0 in 'a'; 0.2.0 in 'b'" in comparison.notes
    assert "another version of torch: 2.9 in 'a'; 3.0 in 'b'" in comparison.notes
    assert "another device: cpu in 'a'; cuda:0 in 'b'" in comparison.notes
    assert "different" not in comparison.verdict


def test_a_run_that_was_made_in_two_ways_is_refused() -> None:
    mixed = make([row("p1", 1.0), row("p2", 1.0, dtype="float16")], "mixed")
    for allow in ((), ("dtype",)):
        with pytest.raises(
            ValueError, match=r"(?s)Score 'mixed' anew.*made in 2 ways.*dtype: float32, float16"
        ):
            compare(run({"p1": 1.0}), mixed, allow=allow, **QUICK)


def test_one_prompt_id_with_two_texts_is_refused() -> None:
    scores = {f"p{index}": 1.0 for index in range(5)}
    other = run(scores, "b", prompt="a cat")
    with pytest.raises(
        ValueError, match="prompt of p0 is 'a picture of p0' in 'a', 'a cat' in 'b'"
    ) as error:
        compare(run(scores), other, **QUICK)
    assert "2 more" in str(error.value) and "p4" not in str(error.value)
    assert "with different prompt" in compare(run(scores), other, allow="prompt", **QUICK).verdict
    within = make([row("p1", 1.0, prompt="a dog"), row("p1", 1.0, id="x", prompt="a cat")])
    with pytest.raises(ValueError, match="'a cat' in 'a'"):
        compare(within, within, **QUICK)


def test_holm_counts_metrics_and_categories_apart() -> None:
    def rows(loc: float, seed: int) -> list[dict[str, Any]]:
        return [
            row(prompt, score, metric=metric, category="anime" if prompt < "p030" else "photo")
            for metric, shift in (("pickscore", loc), ("clip", 0.0), ("hpsv2", 0.0))
            for prompt, score in many(shift, seed=seed + len(metric)).items()
        ]

    comparison = compare(make(rows(0, 0), "before"), make(rows(0.5, 50), "after"), **QUICK)
    whole = [each for each in comparison.differences if each.category is None]
    parts = [each for each in comparison.differences if each.category is not None]
    assert [each.metric for each in whole] == ["pickscore", "clip", "hpsv2"]
    assert [(each.metric, each.category) for each in parts][:3] == [
        ("pickscore", "anime"),
        ("pickscore", "photo"),
        ("clip", "anime"),
    ]
    for family in (whole, parts):
        smallest = min(family, key=lambda each: each.p)
        assert smallest.p_holm == pytest.approx(smallest.p * len(family))
    assert all(each.difference.prompts == 30 for each in parts)
    values = [each.difference.value for each in parts[:2]]
    assert np.mean(values) == pytest.approx(whole[0].difference.value)


def test_a_claim_needs_the_corrected_p() -> None:
    # One metric differs with p of about 0.03, which six others that do not differ take away.
    generator = np.random.default_rng(3)
    scores = {f"p{index:02d}": float(value) for index, value in enumerate(generator.normal(0.3, 1, 50))}

    def of(labels: list[str], change: bool) -> Results:
        rows = [
            row(prompt, score if change and label == "pickscore" else 0.0, metric=label)
            for label in labels
            for prompt, score in scores.items()
        ]
        return make(rows, "b" if change else "a")

    alone = overall(compare(of(["pickscore"], False), of(["pickscore"], True), **QUICK))
    assert 0.05 / 7 < alone.p < 0.05 and alone.better == "b"
    labels = ["pickscore", *(f"other {number}" for number in range(6))]
    among = compare(of(labels, False), of(labels, True), **QUICK).differences[0]
    assert among.p == alone.p and among.p_holm > 0.05 and among.better is None
    chosen = compare(of(labels, False), of(labels, True), metrics=["pickscore"], **QUICK).differences
    assert [each.better for each in chosen] == ["b"]


def test_one_category_for_all_is_the_whole() -> None:
    scores = {"p1": 1.0, "p2": 2.0}
    same = compare(run(scores, category="anime"), run(scores, "b", category="anime"), **QUICK)
    assert [each.category for each in same.differences] == [None]


def test_categories_that_not_every_run_has_are_told() -> None:
    def of(name: str, *categories: str) -> Results:
        prompts = [row(f"p{i}", float(i), category=category) for i, category in enumerate(categories)]
        return make(prompts, name)

    notes = compare(of("a", "x", "y"), of("b", "x", "z"), **QUICK).notes
    assert "no table by category: not every run has 'y' of a" in notes
    assert "no table by category: not every run has 'z' of b" in notes
    comparison = compare(of("a", "x", "y", "v"), of("b", "x", "y", "w"), **QUICK)
    assert {each.category for each in comparison.differences} == {None, "x", "y"}
    assert any("those of all runs: not every run has 'w' of b" in note for note in comparison.notes)
    same = compare(of("a", "x", "y"), of("b", "x", "y"), **QUICK)
    assert not any("category" in note for note in same.notes)


def test_a_setting_may_be_allowed_that_does_not_differ() -> None:
    scores = {"p1": 1.0, "p2": 2.0}
    allow = ("weights", "dtype", "options.prompt", "prompt", "reference", "fingerprint")
    assert compare(run(scores), run(scores, "b"), allow=allow, **QUICK).names == ("a", "b")


def test_three_runs_are_compared_with_the_first_and_ranked() -> None:
    runs = [
        run(many(loc, seed=index), name)
        for index, (loc, name) in enumerate(((0, "a"), (0.2, "b"), (1.5, "c")))
    ]
    comparison = compare(*runs, **QUICK)
    assert [(each.first, each.second) for each in comparison.differences] == [("a", "b"), ("a", "c")]
    assert comparison.differences[1].better == "c"
    assert comparison.differences[1].p_holm == pytest.approx(2 * comparison.differences[1].p)
    table = comparison.strengths["pickscore"].records()
    assert table[0]["run"] == "c"
    assert sum(entry["strength"] for entry in table) == pytest.approx(0, abs=0.01)
    assert all(entry["low"] < entry["strength"] < entry["high"] for entry in table)
    assert "; c is better than a on pickscore" in comparison.verdict
    assert "Bradley-Terry" in str(comparison)
    assert compare(*runs[:2], **QUICK).strengths == {}
    assert len(comparison.pairs("pickscore", "c")) == 60


def test_a_run_that_loses_every_prompt_has_no_strength() -> None:
    runs = [run({f"p{i}": float(i + 100 * (name == "c")) for i in range(9)}, name) for name in "abc"]
    table = compare(*runs, **QUICK).strengths["pickscore"]
    assert [entry["strength"] for entry in table.records()] == [None] * 3
    assert [entry["wins"] for entry in table.records()] == [1, 0.25, 0.25]
    assert "no strengths: some runs won, or lost, every prompt" in table.text()


def test_runs_that_share_no_prompts_have_no_strengths_for_that_reason() -> None:
    own = [{f"{prefix}{index}": float(index) for index in range(9)} for prefix in "xxy"]
    runs = [run(scores, name) for scores, name in zip(own, "abc", strict=True)]
    text = compare(*runs, **QUICK).strengths["pickscore"].text()
    assert "no strengths: no prompt that both have scores of links a and b, or c" in text
    assert "every prompt" not in text


def test_pairs_for_a_gallery() -> None:
    first = make(
        [row("p1", 1.0, seed="1"), row("p1", 5.0, seed="2"), row("p2", 1.0), row("p2", 1.0, id="z")]
    )
    second = make(
        [row("p1", 4.0, seed="2"), row("p1", 3.0, seed="1"), row("p2", 2.0, image="b.png")], "b"
    )
    table = compare(first, second, **QUICK).pairs("pickscore")
    assert list(table.columns) == [
        *("prompt_id", "seed", "prompt", "category", "id_first", "image_first", "score_first"),
        *("id_second", "image_second", "score_second", "gain"),
    ]
    assert table["gain"].tolist() == [2, 1, -1]
    assert table["seed"].tolist()[::2] == ["1", "2"]
    assert table["prompt_id"].tolist() == ["p1", "p2", "p1"]
    assert table.loc[1, "image_second"] == "b.png"
    comparison = compare(first, second, **QUICK)
    for arguments in (("clip",), ("pickscore", "c")):
        with pytest.raises(ValueError, match="choose a metric of 'pickscore' and a run of 'b'"):
            comparison.pairs(*arguments)


def test_numbers_of_whole_sets_are_listed_and_not_tested() -> None:
    fid = {"metric": "fid", "score": 14.5, "reference": "coco", "preprocessing": "clean", "count": 3000}
    fid["dtype"] = "float32"

    def of(name: str, *sets: dict[str, Any]) -> Results:
        found = run(many(prompts=8), name)
        found.sets = list(sets)
        return found

    comparison = compare(of("a", fid), of("b", {**fid, "score": 12.3, "count": 2999}), **QUICK)
    assert comparison.sets.rows == (("fid", "coco", 14.5, 12.3), ("", "pictures", 3000, 2999))
    assert "14.5" in str(comparison) and "fid" not in comparison.verdict
    for field, value in (("reference", "mine"), ("preprocessing", "pytorch-fid"), ("dtype", "float16")):
        with pytest.raises(ValueError, match=f"fid: {field} is {fid[field]} in 'a', {value} in 'b'"):
            compare(of("a", fid), of("b", {**fid, field: value}), **QUICK)
    # The content of a reference counts, not its name.
    named = [{**fid, "reference": name, "reference_sha256": "c" * 64} for name in ("coco", "data/coco")]
    assert len(compare(of("a", named[0]), of("b", named[1]), **QUICK).sets.rows) == 2
    changed = {**named[0], "reference_sha256": "d" * 64}
    with pytest.raises(
        ValueError, match=r"reference is coco \(sha256 cccccccccccc\) in 'a', coco \(sha256 dddd"
    ):
        compare(of("a", named[0]), of("b", changed), **QUICK)
    # Of several references, the same ones go together.
    other = {**fid, "reference": "mine", "score": 99.0}
    both = compare(of("a", fid, other), of("b", other, fid), **QUICK)
    assert [entry[2:] for entry in both.sets.rows[::2]] == [(14.5, 14.5), (99.0, 99.0)]
    assert compare(of("a", fid), of("b"), **QUICK).sets.rows == ()
    # They can be chosen as other metrics can.
    alone = compare(of("a", fid), of("b", fid), metrics=["fid"], **QUICK)
    assert alone.differences == () and len(alone.sets.rows) == 2
    assert compare(of("a", fid), of("b", fid), metrics="pickscore", **QUICK).sets.rows == ()
    with pytest.raises(ValueError, match=r"choose metrics of 'pickscore': not every run .*'fid'"):
        compare(of("a", fid), of("b"), metrics=["fid"], **QUICK)
    without_rows = [make([], name, sets=[fid]) for name in "ab"]
    assert (
        compare(*without_rows, **QUICK).verdict
        == "nothing can be claimed: numbers of whole sets have no interval."
    )


def test_the_tables_are_readable_in_a_terminal() -> None:
    def of(name: str, loc: float, seed: int) -> Results:
        return make(
            [
                row(prompt, score / 100, metric=metric, category="anime" if prompt < "p030" else "photo")
                for metric in ("unified_reward_2", "image_reward")
                for prompt, score in many(loc, seed=seed).items()
            ],
            name,
        )

    comparison = compare(of("before", 0, 0), of("after", -1, 2), **QUICK)
    for text in (str(comparison.table()), str(comparison.table(by_category=True))):
        assert max(map(len, text.splitlines())) <= 100, text
    assert comparison.table().columns == (
        *("metric", "before", "after", "change", "low", "high", "p", "wins", "prompts", "better"),
    )
    assert len(comparison.table(by_category=True).rows) == 4
    page = comparison._repr_html_()
    assert "<table" in page and comparison.verdict[:20] in page
    assert repr(comparison).startswith("<Comparison: after is worse than before")
    long = compare(of("checkpoint-20000-ema", 0, 0), of("<b>", -1, 2), **QUICK)
    assert long.table().columns[1:3] == ("first", "second")
    assert long.table().rows[0][-1] == "first"
    assert "<b>" not in long._repr_html_()


def test_names_are_told_apart(tmp_path: Path) -> None:
    rows = [row("p", 1.0)]
    inside = [make(rows, "eval", tmp_path / parent / "eval") for parent in ("x", "y")]
    assert compare(*inside, **QUICK).names == ("x/eval", "y/eval")
    assert compare(make(rows), make(rows), make(rows), **QUICK).names == ("a", "a (2)", "a (3)")


def test_the_same_pictures_twice_are_told() -> None:
    first, second = (
        make([row("p", 1.0, image_sha256=sha)], name) for sha, name in (("f" * 64, "a"),) * 2
    )
    assert any("the very same pictures" in note for note in compare(first, second, **QUICK).notes)


def test_what_cannot_be_compared_says_what_to_do() -> None:
    scores = {"p1": 1.0, "p2": 2.0}
    cases = [
        (
            run(scores),
            run(scores, metric="clip"),
            {},
            "none in common: 'a' has 'pickscore'; 'a .2.' has 'clip'",
        ),
        (run(scores), run(scores), {"metrics": ["clip"]}, "choose metrics of 'pickscore'.*'clip'"),
        (run(scores), run({"x": 1.0}), {}, "same prompts, or give samples a prompt_id.*'p1', 'p2'.*'x'"),
        (run({"p": [1.0]}), run({"p": [float("nan")]}), {}, "look at failures.. of the runs"),
        (run(scores), run(scores), {"confidence": 95}, "between 0 and 1"),
        (run(scores), run(scores), {"resamples": 0}, "at least 100"),
        (run(scores), run(scores), {"pair_by": ("category",)}, "pair by"),
        (run(scores), run(scores), {"metrics": []}, "metrics is empty: name some of 'pickscore'"),
        (run(scores), run(scores), {"allow": ("dtyp",)}, "allow names .*'dtype'.*'weights'; got 'dtyp'"),
        (
            run(scores),
            run({"p1": 1.0, "p2": -1e308}, "b"),
            {},
            "other metrics.*the score -1e.308 of pickscore for 'p2-0' in 'b' is too large",
        ),
    ]
    for first, second, options, message in cases:
        with pytest.raises(ValueError, match=message):
            compare(first, second, **{**QUICK, **options})
    with pytest.raises(TypeError, match="folder; got DataFrame"):
        compare(run(scores), pd.DataFrame())
    only_one = make([row("p1", 1.0), row("p1", 1.0, metric="clip")])
    assert "not compared, but scored in a: clip" in compare(only_one, run(scores, "b"), **QUICK).notes


class Simulated:
    """What compare() reads of Results, made quickly."""

    def __init__(self, frame: pd.DataFrame, name: str) -> None:
        self.name, self.frame = name, frame
        self.metrics = {"pickscore": {"card": {"higher_is_better": True}}}
        self.path, self.sets = None, ()

    def to_pandas(self) -> pd.DataFrame:
        return self.frame


@pytest.mark.slow
def test_equal_models_differ_in_one_of_twenty_comparisons() -> None:
    """1,000 simulations of two equal models, 200 prompts x 4 seeds; then of 0.2 standard deviations.

    A prompt has a difficulty that both models share, and one of its own for each model, which
    all seeds share: pictures of one prompt correlate with 0.5. The standard deviation is that of the
    differences of prompt means.
    """
    generator = np.random.default_rng(0)
    prompts = np.repeat([f"p{index:03d}" for index in range(200)], 4)
    frame = pd.DataFrame([row(prompt, 0.0, seed=str(i % 4)) for i, prompt in enumerate(prompts)])
    shape = (200, 1)

    def share(simulations: int, shift: float) -> float:
        claimed = 0
        for _ in range(simulations):
            difficulty, runs = generator.normal(scale=3, size=shape), []
            for name, better in (("a", 0.0), ("b", shift * np.sqrt(2 * (1 + 1 / 4)))):
                own = (
                    difficulty + generator.normal(size=shape) + generator.normal(size=(200, 4)) + better
                )
                runs.append(Simulated(frame.assign(score=own.ravel()), name))
            found = overall(compare(*runs, resamples=499))
            claimed += found.better is not None
        return claimed / simulations

    assert 0.03 <= share(1000, 0.0) <= 0.07
    assert share(200, 0.2) > 0.65
