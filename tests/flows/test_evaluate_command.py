"""`pedigree evaluate` on small sets of each task, without services, as for a weights folder."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import jaccard_score, root_mean_squared_error
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from torch import nn
from typer.testing import CliRunner

from components.data.evalset import read_evalset
from components.data.evaluation_set import read_evaluation_set
from components.evaluation import comparison_pictures, settings, stage
from components.evaluation.config import KnnConfig
from components.evaluation.features import EvaluationImages
from components.evaluation.protocols import knn, retrieval
from components.model.config import Preprocessing, ViTConfig
from components.model.export import load_backbone, save_weights
from components.model.vit import VisionTransformer
from components.recipe import load_recipe
from flows.cli import app
from tests.data import evalset_folders as folders
from tests.evaluation.class_tokens import class_tokens
from tests.evaluation.test_evaluation_stage import tiles, write_set

PROJECT = Path(__file__).parents[2]
SHAPE = ViTConfig(patch_size=8, dim=48, depth=2, num_heads=3, image_size=32, layer_scale_init=1.0)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(PROJECT / name, root / name)
    write_set(root, tiles(), source="photographs")
    with pytest.MonkeyPatch.context() as patch:
        folders.judge_by_facts_only(patch)
        for make in (folders.classification, folders.segmentation, folders.depth, folders.retrieval, folders.video):
            folders.add(make(root / "data" / make.__name__), make.__name__)
        sketches = {f"images/{name}/{n}.png": folders.photo(90 + n + 10 * len(name)) for name in ("cup", "brick")
                    for n in range(4)}  # fmt: skip
        options = {"train_set": "photographs", "mapping": {"cup": "coffee"}}
        sketches["evalset.yaml"] = folders.config("classification", **options)
        folders.add(folders.write(root / "data/sketches", sketches), "sketches")
        clustered = folders.classification(root / "data/clustered")
        folders.write(clustered, {"evalset.yaml": folders.config("classification", groups=["light"], clusters="light")})
        folders.add(clustered, "clustered")
    for number, name in ((1, "one"), (2, "two")):
        torch.manual_seed(number)
        save_weights(root / "weights" / name, VisionTransformer(SHAPE), None, {})
    return root


def asked(checkout: Path, *words: str, code: int = 0) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setattr(settings, "FEWEST_STEPS", 6)
        done = CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


def test_a_model_beside_others_on_classes(checkout: Path, tmp_path: Path):
    """The figures are those of the protocol by itself, and the page is complete in itself."""
    page = tmp_path / "page.html"
    words = ("weights/one", "--set", "photographs", "--against", "weights/two", "--protocol", "knn")
    told = json.loads(asked(checkout, *words, "--html", str(page), "--json"))
    assert list(told["scores"]) == ["weights/one", "weights/two", "random", "descriptor"]
    images = read_evaluation_set(checkout / "data/evaluation/photographs/0123456789ab")
    crops = EvaluationImages(images, Preprocessing().at(32))
    pixels = torch.stack([crops[index] for index in range(len(crops))])
    for name in ("one", "two"):
        features = class_tokens(load_backbone(checkout / "weights" / name), pixels)
        expected = knn.evaluate(features, images.labels, KnnConfig(num_neighbors=(5, 10, 20), reported=10))
        assert told["scores"][f"weights/{name}"]["knn_top1"] == expected.metrics["knn_top1"]
    difference = told["differences"]["descriptor"]["knn_top1"]
    found = {name: told["scores"][name]["knn_top1"] for name in ("weights/one", "descriptor")}
    assert difference["mean"] == pytest.approx(found["weights/one"] - found["descriptor"])
    assert {one["other"] for one in told["verdicts"]} == {"weights/two", "random", "descriptor"}
    assert told["contamination"]["weights/one"]["unknown"] == "no registry knows these weights"
    assert set(told["costs"]) == {"weights/one", "weights/two"}
    assert told["costs"]["weights/one"]["device_seconds"] > 0
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for part in (
        "weights/one minus descriptor",
        "knn_top1 of each class",
        "Patch features",
        "Nearest neighbors",
        "contamination",
    ):
        assert part in text
    shown = asked(checkout, *words)
    assert re.search(r"weights/one is (better than|worse than|no better and no worse than) descriptor: knn_top1", shown)


@pytest.mark.parametrize(
    ("task", "protocol", "metric"),
    [("segmentation", "segmentation", "segmentation_miou"),
     ("segmentation", "segmentation-lin4", "segmentation_lin4_miou"),
     ("segmentation", "segmentation-ms", "segmentation_ms_miou"), ("depth", "depth", "depth_rmse"),
     ("depth", "depth-lin4", "depth_lin4_rmse"), ("retrieval", "retrieval", "retrieval_map_medium"),
     ("classification", "linear", "linear_top1"), ("classification", "probe", "probe_top1")],
)  # fmt: skip
def test_each_protocol_measures_its_task(checkout: Path, task: str, protocol: str, metric: str):
    told = json.loads(asked(checkout, "weights/one", "--set", task, "--protocol", protocol, "--json"))
    assert told["protocols"] == [protocol]
    for name in ("weights/one", "random", "descriptor"):
        assert np.isfinite(told["scores"][name][metric])
    if protocol.endswith("-lin4"):
        assert f"descriptor, {protocol}: reads 1 layers, not 4: the model gives no more" in told["facts"]


class TwoOutputs(nn.Module):
    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.backbone(images)
        return output.cls_token, output.patch_tokens


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_traced_network_beside_its_weights_has_their_scores(checkout: Path):
    folder = checkout / "traced"
    folder.mkdir()
    network = TwoOutputs(load_backbone(checkout / "weights/one"))
    torch.jit.trace(network, torch.zeros(1, 3, 32, 32)).save(folder / "one.pt")
    sizes = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    path = "traced/one.pt"
    words = (path, "--set", "photographs", "--protocol", "knn", "--against", "weights/one", "--json")
    told = json.loads(asked(checkout, *words))
    assert list(told["scores"]) == ["traced/one.pt", "weights/one", "descriptor"]
    own, exported = told["scores"]["weights/one"], told["scores"]["traced/one.pt"]
    assert exported["knn_top1"] == own["knn_top1"]
    assert exported["effective_rank"] == pytest.approx(own["effective_rank"], rel=1e-4)
    assert "no random weights beside it: traced/one.pt has no shape apart from its weights" in told["facts"]
    assert "traced/one.pt: its last layer is all that is read, and its features are class tokens" in told["facts"]
    assert told["contamination"]["traced/one.pt"]["unknown"] == "no registry knows these weights"
    words = ("weights/one", "--against", path, "--set", "depth", "--protocol", "depth", "--protocol", "depth-lin4")
    told = json.loads(asked(checkout, *words, "--json"))
    own, exported = (told["scores"][name]["depth_rmse"] for name in ("weights/one", "traced/one.pt"))
    assert exported == pytest.approx(own, rel=1e-4)
    assert "traced/one.pt, depth-lin4: reads 1 layers, not 4: the model gives no more" in told["facts"]
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    torch.jit.trace(pooled, torch.zeros(1, 3, 32, 32)).save(folder / "pooled.pt")
    told = asked(checkout, "traced/pooled.pt", "--set", "depth", code=2)
    assert "depth, depth-lin4: traced/pooled.pt gives no patch tokens to read; name a model first" in told
    words = ("weights/one", "--against", "traced/pooled.pt", "--set", "depth", "--protocol", "depth", "--json")
    told = json.loads(asked(checkout, *words))
    assert "depth_rmse" not in told["scores"]["traced/pooled.pt"]
    assert "traced/pooled.pt, depth: not measured: the model gives no patch tokens" in told["facts"]
    words = (path, "--set", "photographs", "--protocol", "robustness")
    assert "mCE is held against random weights of the shape of traced/one.pt" in asked(checkout, *words, code=2)


def test_a_set_is_measured_by_what_was_learned_on_another(checkout: Path):
    told = json.loads(asked(checkout, "weights/one", "--set", "sketches", "--json"))
    assert "only the 2 of its 3 classes that the set has can be predicted" in told["facts"][0]
    (folder,) = (checkout / "data/evaluation/sketches").glob("*/manifest.parquet")
    learned = read_evaluation_set(checkout / "data/evaluation/photographs/0123456789ab")
    own, extract = read_evalset(folder.parent).images, partial(class_tokens, load_backbone(checkout / "weights/one"))
    parts = {}
    for name, images, rows in (("train", learned, learned.labels.train), ("test", own, own.labels.test)):
        crops = EvaluationImages(images, Preprocessing().at(32))
        parts[name] = normalize(extract(torch.stack([crops[int(row)] for row in rows])))
    targets = learned.labels.targets[learned.labels.train]
    shared = targets != learned.labels.classes.index("astronaut")
    model = KNeighborsClassifier(10, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    predicted = model.fit(parts["train"][shared], targets[shared]).predict(parts["test"])
    correct = predicted == own.labels.targets[own.labels.test]
    assert told["scores"]["weights/one"]["knn_top1"] == correct.mean()
    assert {"linear_top1", "probe_top1"} <= set(told["scores"]["descriptor"])


def test_clips_are_measured_by_the_mean_of_their_frames(checkout: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    words = ("weights/one", "--set", "video", "--protocol", "knn", "--protocol", "linear", "--html", str(page))
    told = json.loads(asked(checkout, *words, "--json"))
    assert "2 train and 2 test clips" in told["facts"][0]
    (folder,) = (checkout / "data/evaluation/video").glob("*/manifest.parquet")
    evalset, extract = read_evalset(folder.parent), partial(class_tokens, load_backbone(checkout / "weights/one"))
    crops = EvaluationImages(evalset.clips.frames, Preprocessing().at(32))
    frames = extract(torch.stack([crops[index] for index in range(len(crops))]))
    features, labels = frames[evalset.clips.rows].mean(axis=1), evalset.images.labels
    cosines = normalize(features[labels.test]) @ normalize(features[labels.train]).T
    # Of two neighbors, the nearer one has the larger vote.
    expected = labels.targets[labels.train][cosines.argmax(axis=1)] == labels.targets[labels.test]
    assert told["scores"]["weights/one"]["knn_top1"] == expected.mean()
    assert "linear_top1" in told["scores"]["random"]
    assert "Nearest neighbors" in page.read_text()


def test_retrieval_by_several_sizes_is_that_of_the_mean_of_its_features(checkout: Path, tmp_path: Path):
    words = ("weights/one", "--set", "retrieval", "--protocol", "retrieval-ms", "--html", str(tmp_path / "page.html"))
    told = json.loads(asked(checkout, *words, "--json"))
    assert "Lowest retrieval_ms_map_medium first, of 2 queries" in (tmp_path / "page.html").read_text()
    assert told["notes"]["weights/one"] == {"retrieval_ms_sizes": "32, 24, 16 pixels"}  # 22.6 in whole patches of 8
    (folder,) = (checkout / "data/evaluation/retrieval").glob("*/manifest.parquet")
    evalset, extract = read_evalset(folder.parent), partial(class_tokens, load_backbone(checkout / "weights/one"))
    parts = []
    for size in (32, 24, 16):
        crops = EvaluationImages(evalset.images, Preprocessing(resize_size=size, crop_size=size))
        parts.append(extract(torch.stack([crops[index] for index in range(len(crops))])))
    queries = [retrieval.Query(q.index, *map(tuple, (q.easy, q.hard, q.junk))) for q in evalset.queries]
    expected = retrieval.evaluate(np.mean(parts, axis=0), queries, evalset.gallery)
    for mode in ("easy", "medium", "hard"):
        found = told["scores"]["weights/one"][f"retrieval_ms_map_{mode}"]
        assert found == expected.metrics[f"retrieval_map_{mode}"]


@pytest.mark.parametrize(("task", "draw"), [("segmentation", "draw_segmentation"), ("depth", "draw_depth")])
def test_the_page_shows_what_the_scored_heads_predict(checkout: Path, tmp_path: Path, task: str, draw: str):
    """Scores are computed again from the maps that are drawn; the worst are in order."""
    real, drawn = getattr(comparison_pictures, draw), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_pictures, draw, lambda *given: (drawn.append(given), real(*given))[1])
        asked(checkout, "weights/one", "--set", task, "--protocol", task, "--html", str(tmp_path / "page.html"))
    assert len(drawn) == 1  # of two test images or one, none is left beside the worst
    shown, predicted, *_ = drawn[0]
    assert list(predicted) == ["weights/one", "random", "descriptor"]
    for one in predicted.values():
        for truth, found, note in zip(shown.truth, one.maps, one.notes, strict=True):
            known = np.isfinite(truth) if task == "depth" else truth != 255
            if task == "depth":
                expected = root_mean_squared_error(truth[known], found[known])
            else:
                labels = np.unique(truth[known])
                expected = jaccard_score(truth[known], found[known], labels=labels, average="macro")
            assert float(note) == pytest.approx(expected, abs=6e-4)
    notes = [float(note) for note in predicted["weights/one"].notes]
    assert notes == sorted(notes, reverse=task == "depth")
    assert "Worst predictions of weights/one" in (tmp_path / "page.html").read_text()


def test_clusters_widen_the_intervals_and_choices_are_told(checkout: Path):
    """The same images, once as independent and once as parts of two photographs."""
    plain, clustered = (
        json.loads(asked(checkout, "weights/one", "--set", name, "--protocol", "knn", "--json"))
        for name in ("classification", "clustered")
    )
    assert plain["scores"]["weights/one"] == clustered["scores"]["weights/one"]
    for found in plain["intervals"]:
        narrow, wide = (told["intervals"][found]["knn_top1"] for told in (plain, clustered))
        assert wide["high"] - wide["low"] > 1.2 * (narrow["high"] - narrow["low"])
    for found in plain["differences"]:
        narrow, wide = (told["differences"][found]["knn_top1"] for told in (plain, clustered))
        assert wide["low"] <= narrow["low"] <= narrow["high"] <= wide["high"]
    assert "intervals take the 2 values of light as independent, not the images" in clustered["facts"]
    assert "weights/one: shorter side 37 pixels, crop 32" in plain["facts"]


def test_robustness_is_measured_when_asked_for(checkout: Path):
    told = json.loads(asked(checkout, "weights/one", "--set", "classification", "--protocol", "robustness", "--json"))
    found = told["scores"]
    assert 0 <= found["weights/one"]["corruption_accuracy"] <= 1
    assert sum(key.startswith("corruption_accuracy.") for key in found["weights/one"]) == 15
    assert found["random"]["mce"] == pytest.approx(1.0)
    curves = told["corruptions"]["weights/one"]
    assert {len(one) for one in curves.values()} == {6}
    assert np.mean([one[1:] for one in curves.values()]) == pytest.approx(found["weights/one"]["corruption_accuracy"])


def test_the_stage_measures_every_set_as_the_command_does(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    """Metrics of the main set keep their names; others carry their set's. Rows by image are of the same images."""
    monkeypatch.setattr(settings, "FEWEST_STEPS", 6)
    recipe = load_recipe(checkout, None).evaluate
    changed = {"models": {"one": "weights/one"}, "preprocessing": Preprocessing().at(32)}
    config = recipe.model_copy(update={**changed, "long_protocols": ("depth-lin4",)})
    result = stage.run(config, checkout, 0, "one")
    folder = checkout / "reports/evaluate/one"
    by_image = pq.read_table(folder / "by_image.parquet")
    assert not [name for name in result if "_ms_" in name], "several passes over the images, and nobody asked"
    measured = {
        "photographs": ["knn", "linear"],
        "segmentation": ["segmentation"],
        "depth": [],
        "retrieval": [],
        "clustered": ["knn"],
    }
    for name, protocols in measured.items():
        words = [word for protocol in protocols for word in ("--protocol", protocol)]
        told = json.loads(asked(checkout, "weights/one", "--set", name, *words, "--json"))
        main = name == "photographs"
        assert result["decides" if main else f"{name}/decides"].endswith(told["verdicts"][0]["metric"])
        for model, ours in (("weights/one", result), ("random", result["random"])):
            scores = told["scores"][model]
            assert scores == {key: ours[key if main else f"{name}/{key}"] for key in scores}
        for metric, expected in told["differences"]["random"].items():
            assert result["minus_random"][metric if main else f"{name}/{metric}"] == expected
            chosen = by_image.filter(pc.equal(by_image["set"], name)).filter(pc.field("model") == "one")
            values = chosen.filter(pc.field("metric") == (metric if main else f"{name}/{metric}"))
            assert pc.mean(values["value"]).as_py() == pytest.approx(told["scores"]["weights/one"][metric])
    assert {path.stem for path in (folder / "sets").glob("*.html")} == {
        *measured,
        "classification",
        "sketches",
        "video",
    } - {"photographs"}
    verdict = re.search(r"depth: one is [a-z ]+ random: depth_rmse", (folder / "report.html").read_text())
    assert verdict
    assert verdict[0].removeprefix("depth: ") in (folder / "sets/depth.html").read_text()
    clustered = by_image.filter(pc.equal(by_image["set"], "clustered"))
    assert set(pc.unique(clustered["cluster"]).to_pylist()) == {"day", "night"}


def test_what_cannot_be_measured_is_one_line(checkout: Path):
    told = asked(checkout, "weights/one", "--set", "birds", code=2)
    assert (
        "--set birds: no such set; there are classification, clustered, depth, photographs, retrieval, segmentation, "
        "sketches, video" in told
    )
    told = asked(checkout, "weights/one", "--set", "depth", "--protocol", "knn", code=2)
    assert "--protocol knn: depth is a set of task depth, for which there are depth, depth-lin4" in told
    told = asked(checkout, "weights/one", "--set", "depth", "--against", "weights/one", code=2)
    assert "weights/one: two models of one name; give each once" in told
    told = asked(checkout, "nowhere", "--set", "depth", code=2)
    assert "nowhere: no such folder; give NAME@ALIAS, NAME/NUMBER or a weights folder" in told
