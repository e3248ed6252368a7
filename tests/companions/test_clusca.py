"""ClusCa and Hi-ClusCa: the reference by the rules, the fast path by the reference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.reference
from hicache import HiCacheConfig
from hicache.companions.clusca import ClusCa
from hicache.companions.clusca.draws import Draws, Groups
from hicache.companions.clusca.families import double_blocks, find_family
from hicache.companions.clusca.kmeans import k_means
from hicache.companions.clusca.settings import LABELS, VARIANTS
from hicache.reference.clusters import ClusteredModel, Clusters
from hicache.reference.history import History
from tests.support import pipelines
from tests.support.clusca import CONFIG, FAMILIES, MANY, Spy, by_reference, off, recorded, with_full_mlps
from tests.support.runs import Run, recorded_in, replay
from tests.support.schedulers import CountingScheduler

CPU = torch.device("cpu")


# 1 and 2: nothing is left out, or nothing computed.


@pytest.mark.parametrize("name", FAMILIES)
def test_1_interval_one_is_bit_for_bit_the_full_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(Groups, "of", lambda *args: found.append(args))
    model, run = recorded(name)
    every = HiCacheConfig(interval=1)
    assert torch.equal(by_reference(name, ClusCa(clusters=4), every), replay(model, run))
    assert not found  # no clusters where no step is skipped


@pytest.mark.parametrize("name", FAMILIES)
def test_2_no_clusters_is_plain_hicache(name: str) -> None:
    plain = by_reference(name, None)
    assert torch.equal(by_reference(name, ClusCa(clusters=0)), plain)
    assert off(by_reference(name, ClusCa(clusters=4)), plain) > 1e-4  # which some are not


# 3: the rules, token by token.


def settled(clusters: ClusCa, tokens: int = 12) -> tuple[Clusters, Groups, History, Tensor]:
    """Clusters of two samples, a history of an MLP that is four steps old, and what the MLP is given."""
    model = copy.deepcopy(recorded("flux")[0])
    width = model.config.num_attention_heads * model.config.attention_head_dim
    generator = torch.Generator().manual_seed(3)

    def noise() -> Tensor:
        return torch.randn(2, tokens, width, generator=generator, dtype=torch.float64)

    history = History(CONFIG)
    for step in range(3):
        history.record(step, noise())
    clustered = Clusters(ClusteredModel(clusters, model))
    undo = clustered.watch(full=True)
    hidden = noise()
    model.transformer_blocks[-1].forward = lambda: (None, hidden)
    model.transformer_blocks[-1]()
    undo()
    groups = Groups.of(hidden, Draws(clusters, 2, CPU).first, None, clusters.iterations)
    return clustered, groups, history, noise()


def by_hand(
    clusters: ClusCa, groups: Groups, history: History, block: int, hidden: Tensor, step: int
) -> Tensor:
    """The rule of docs/companions.md for an MLP that doubles what it is given, one token at a time."""
    numbers = Draws(clusters, 2, CPU).of(step)[block if clusters.variant == "upstream" else 0]
    differences = [difference.clone() for difference in history.differences]
    row = copy.deepcopy(history)
    ahead = history.forecast(step)
    out = ahead.clone()
    for sample in range(len(hidden)):
        for cluster in range(groups.centroids.shape[1]):
            members = [t for t in range(hidden.shape[1]) if int(groups.labels[sample, t]) == cluster]
            if not members:
                continue
            drawn = members[int(float(numbers[cluster]) * len(members))]
            value = 2 * hidden[sample, drawn]
            for token in members:
                far = ahead[sample, token]
                if clusters.variant == "upstream":
                    newest = differences[0][sample, token]
                    new = value if token == drawn else clusters.rho * value + (1 - clusters.rho) * newest
                    differences[0][sample, token] = new
                elif token == drawn:
                    out[sample, token] = value
                elif clusters.variant == "exact":
                    out[sample, token] = (1 - clusters.rho) * far + clusters.rho * value
                else:
                    out[sample, token] = far + clusters.kappa * (value - ahead[sample, drawn])
    if clusters.variant != "upstream":
        return out
    row.differences = differences
    return row.forecast(step)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", [0, 1])
def test_3_every_token_gets_what_its_variant_says(variant: str, block: int) -> None:
    settings = ClusCa(clusters=4, rho=0.2, kappa=0.3, variant=variant)
    clusters, groups, history, hidden = settled(settings)
    path = f"transformer_blocks.{block}.ff"
    for step in (3, 4):  # edits of the first are there in the second
        wanted = by_hand(settings, groups, history, block, hidden, step)
        got = clusters.forecast(
            step, path, lambda rows: 2 * rows, hidden, history, functools.partial(history.forecast, step)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["exact", "residual"])
def test_3_an_mlp_that_gives_the_forecast_changes_nothing(variant: str) -> None:
    settings = ClusCa(clusters=4, rho=0.0, variant=variant)
    clusters, groups, history, hidden = settled(settings)
    ahead = history.forecast(5)
    drawn = groups.draw(Draws(settings, 2, CPU).of(5)[0])
    given = ahead.gather(1, drawn[..., None].expand(-1, -1, ahead.shape[-1]))
    got = clusters.forecast(5, "transformer_blocks.0.ff", lambda rows: given, hidden, history, lambda: ahead)
    torch.testing.assert_close(got, ahead, rtol=1e-6, atol=1e-6)
    assert history.forecast(5).equal(ahead)  # and the history is as it was


# 4: every token computed.


@pytest.mark.few(5)
@pytest.mark.parametrize("name", [*FAMILIES, "flux_controlnet", "flux_ip_adapter"])
@pytest.mark.parametrize("variant", ["exact", "residual"])
def test_4_a_cluster_a_token_runs_every_mlp_in_full(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = with_full_mlps(name, monkeypatch)
    assert off(by_reference(name, ClusCa(clusters=MANY, variant=variant)), wanted) < 1e-10


# 6: text.


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])
def test_6_what_a_skipped_step_makes_of_text_reaches_no_picture(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ClusCa(clusters=4, variant="upstream", rho=0.1)
    wanted = by_reference(name, settings)
    record, spoiled = History.record, []
    texts = {kwargs["encoder_hidden_states"].shape[1] for calls in recorded(name)[1] for _, kwargs in calls}

    def spoil(history: History, step: int, feature: Tensor) -> None:
        record(history, step, feature)
        if feature.shape[1] in texts:
            history.differences[0] = history.differences[0] + 1
            spoiled.append(step)

    monkeypatch.setattr(History, "record", spoil)
    # singles of FLUX hold text and image in one feature, and are left alone
    assert off(by_reference(name, settings), wanted) < 1e-10
    assert spoiled


# 7: draws.


@pytest.mark.parametrize("variant", VARIANTS)
def test_7_a_seed_is_a_picture_and_the_global_generator_is_left_alone(variant: str) -> None:
    settings = ClusCa(clusters=4, variant=variant, rho=0.1, seed=5)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = by_reference("flux", settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(by_reference("flux", settings), one)
    assert not torch.equal(by_reference("flux", ClusCa(clusters=4, variant=variant, rho=0.1, seed=6)), one)


def swapped(value: Any, batch: int) -> Any:
    """Samples in another order; ids of tokens have no samples."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value.flip(0)
    return value


def test_7_the_order_of_a_batch_orders_pictures_and_no_more() -> None:
    model, run = recorded("flux_many")
    batch = len(run[0][0][1]["hidden_states"])
    assert batch == 2
    assert not run[0][0][1]["hidden_states"][0].equal(run[0][0][1]["hidden_states"][1])
    other = [
        [
            (args, {k: v if k.endswith("ids") else swapped(v, batch) for k, v in kwargs.items()})
            for args, kwargs in calls
        ]
        for calls in run
    ]
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, CONFIG, scheduler=scheduler, clusters=ClusCa(clusters=4)):
        one = replay(model, run, scheduler)
        two = replay(model, other, scheduler)
    calls = sum(map(len, run))
    pictures = [returned.view(calls, batch, -1) for returned in (one, two)]
    assert off(pictures[1].flip(1), pictures[0]) < 1e-10


@pytest.mark.parametrize("tokens", [3, 16, 50])
def test_7_tokens_are_drawn_of_their_own_cluster_and_each_as_often(tokens: int) -> None:
    labels = torch.arange(tokens) % 3
    points = torch.nn.functional.one_hot(labels, 3).double()[None] * 10
    groups = Groups.of(points, torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64), None, 10)
    seen: set[int] = set()
    for number in torch.linspace(0, 1, 301, dtype=torch.float64)[:-1]:
        drawn = groups.draw(number.expand(3))
        assert groups.labels.gather(1, drawn).tolist() == [[0, 1, 2]]
        assert int(groups.are_drawn(drawn).sum()) == 3
        seen |= set(drawn.flatten().tolist())
    assert seen == set(range(tokens))


# 8: k-means.


def blobs() -> tuple[Tensor, Tensor]:
    """Two samples of ninety points around three places, and which place each is of."""
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0, 0], [10, 0, 0], [0, 10, 10]])
    of = torch.stack([torch.arange(90) % 3, torch.randint(3, (90,), generator=generator)])
    return places[of] + torch.randn(2, 90, 3, generator=generator) * 0.3, of


def test_8_k_means_finds_blobs_in_every_sample() -> None:
    points, of = blobs()
    labels, centroids = k_means(points, points[:, :3].clone().copy_(points[:1, :3]), 10)
    for sample in range(2):
        for blob in range(3):
            [found] = set(labels[sample, of[sample] == blob].tolist())
            mean = points[sample, of[sample] == blob].mean(0)
            torch.testing.assert_close(centroids[sample, found], mean, rtol=1e-5, atol=1e-5)


def test_8_an_emptied_cluster_keeps_its_centroid_and_is_never_drawn() -> None:
    points, _ = blobs()
    far = torch.full((2, 1, 3), -500.0)
    start = torch.cat([points[:, :3], far], dim=1)
    labels, centroids = k_means(points, start, 10)
    assert int((labels == 3).sum()) == 0
    assert centroids[:, 3:].equal(far)
    alike = torch.zeros(1, 8, 4)  # tokens that are all the same: one cluster has them all
    groups = Groups.of(alike, torch.linspace(0, 0.9, 4, dtype=torch.float64), None, 10)
    drawn = groups.draw(torch.full((4,), 0.99, dtype=torch.float64))
    assert groups.counts.tolist() == [[8, 0, 0, 0]]
    assert groups.are_drawn(drawn).sum() == 1
    assert not groups.centroids.isnan().any()


def test_8_a_warm_start_is_there_after_one_iteration() -> None:
    points, _ = blobs()
    labels, centroids = k_means(points, points[:, :3], 10)
    again, moved = k_means(points, centroids, 1)
    assert again.equal(labels)
    torch.testing.assert_close(moved, centroids)
    far, _ = k_means(points, points[:, :3], 1)
    assert k_means(points, points[:, :3], 10)[0].equal(labels)
    assert far.shape == labels.shape


def test_8_one_sample_at_rest_does_not_stop_the_others() -> None:
    points, _ = blobs()
    _, rest = k_means(points, points[:, :3], 10)
    start = torch.cat([rest[:1], points[1:, :3]])
    together = k_means(points, start, 10)
    alone = k_means(points[1:], points[1:, :3], 10)
    assert together[0][1:].equal(alone[0])
    torch.testing.assert_close(together[1][1:], alone[1])


# 9: what the MLP is called with.


def hidden_shape(model: nn.Module, run: Run) -> tuple[int, int, int]:
    """Of the image's hidden state in the first call."""
    args, kwargs = run[0][0]
    shapes: list[torch.Size] = []
    mlp = getattr(double_blocks(model)[0], find_family(model).mlp)
    hook = mlp.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    with torch.no_grad():
        model(*args, **kwargs)
    hook.remove()
    batch, tokens, channels = shapes[0]
    return batch, tokens, channels


# seven skipped steps of twelve, two calls a step where guidance is not one batch
@pytest.mark.parametrize(("name", "calls"), [("flux", 1), ("flux_many", 2), ("sd3_many", 1), ("qwen", 2)])
def test_9_an_mlp_is_called_once_a_block_on_a_token_a_cluster(name: str, calls: int) -> None:
    model, run = recorded(name)
    batch, tokens, channels = hidden_shape(model, run)
    with Spy(model) as shapes:
        by_reference(name, ClusCa(clusters=5))
    blocks, skipped = len(double_blocks(model)), 12 - 5
    assert shapes.count((batch, 5, channels)) == calls * skipped * blocks
    assert len(shapes) == calls * 12 * blocks
    assert tokens > 5


# Edges.


@pytest.mark.parametrize("labels", LABELS)
def test_pictures_one_after_the_other_share_nothing(labels: str) -> None:
    settings = ClusCa(clusters=4, variant="upstream", rho=0.1, labels=labels)
    pipe, arguments = pipelines.build_randomized("flux")
    other = {**arguments, "prompt_embeds": arguments["prompt_embeds"] * 0.5 + 1}
    with hicache.reference.apply(pipe, CONFIG, clusters=settings):
        pictures = [pipelines.draw(pipe, given) for given in (arguments, other, arguments)]
    assert pictures[0].equal(pictures[2])
    assert not pictures[0].equal(pictures[1])
    with hicache.reference.apply(pipe, CONFIG, clusters=settings):
        assert pipelines.draw(pipe, other).equal(pictures[1])


def test_the_two_kinds_of_labels_are_two_pictures() -> None:
    one, two = (by_reference("flux", ClusCa(clusters=4, rho=0.1, labels=labels)) for labels in LABELS)
    assert not one.equal(two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_finite_and_in_its_dtype(dtype: torch.dtype) -> None:
    model, run = recorded_in("flux", dtype)
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, CONFIG, scheduler=scheduler, clusters=ClusCa(clusters=4)):
        assert replay(model, run, scheduler).isfinite().all()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"clusters": -1}, ValueError, "ClusCa.clusters: expected an int >= 0, got -1"),
        ({"clusters": 2.5}, TypeError, "ClusCa.clusters: expected an int >= 0, got 2.5"),
        ({"rho": 1.5}, ValueError, "ClusCa.rho: expected a number from 0 to 1, got 1.5"),
        ({"rho": float("nan")}, ValueError, "ClusCa.rho: expected a finite number >= 0, got nan"),
        ({"kappa": -0.1}, ValueError, "ClusCa.kappa: expected a finite number >= 0, got -0.1"),
        ({"variant": "best"}, ValueError, "expected one of exact, upstream, residual, got 'best'"),
        ({"labels": "always"}, ValueError, "expected one of full-steps, once-first-block, got 'always'"),
        ({"iterations": 0}, ValueError, "ClusCa.iterations: expected an int >= 1, got 0"),
        ({"seed": -3}, ValueError, "ClusCa.seed: expected an int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_setting_says_what_was_expected(given: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error) as raised:
        ClusCa(**given)
    assert said in str(raised.value)


def test_the_reference_refuses_what_it_does_not_know_and_leaves_it_alone() -> None:
    pipe, _ = pipelines.build("wan")
    before = dict(vars(pipe.transformer))
    with pytest.raises(
        ValueError, match=r"MLPs of double blocks in Wan\w+ are not known; known models are DiT"
    ):
        hicache.reference.apply(pipe, CONFIG, clusters=ClusCa())
    with pytest.raises(TypeError, match="expected clusters to be a ClusCa or None, got 16"):
        hicache.reference.apply(pipe, CONFIG, clusters=16)  # type: ignore[arg-type]
    assert vars(pipe.transformer) == before
