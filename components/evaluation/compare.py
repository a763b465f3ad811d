"""Compare models on one evaluation set by the protocols of its task; each protocol is a file of `protocols`."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from components.core.config import ConfigError
from components.core.intervals import is_accuracy
from components.core.metrics import effective_rank, feature_std
from components.core.storage import sha256_file
from components.data.evalset import Evalset
from components.evaluation.baselines import DESCRIPTOR, RANDOM, random_network
from components.evaluation.corrupted import CorruptedImages, corrupted_results
from components.evaluation.descriptor import describe
from components.evaluation.features import EvaluationImages
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.protocols import depth, knn, linear, probe, retrieval, robustness, segmentation, slices
from components.evaluation.scores import Scores
from components.evaluation.settings import Settings
from components.evaluation.tokens import Loading, TokenRequest, Tokens, find_tokens, joined, of_clips
from components.model.config import Preprocessing, ViTConfig
from components.model.export import BACKBONE_FILE, load_backbone
from components.model.vit import VisionTransformer

log = logging.getLogger(__name__)

ROBUSTNESS = "robustness"


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        name: for a person.
        digest: of its weights.
        backbone: in evaluation mode on its device; None: the descriptor of colors and edges.
        preprocessing: of the set's images.
    """

    name: str
    digest: str
    backbone: VisionTransformer | None
    preprocessing: Preprocessing

    @property
    def device(self) -> torch.device:
        """Device that features are computed on."""
        return torch.device("cpu") if self.backbone is None else next(self.backbone.parameters()).device


@dataclass(frozen=True)
class Protocol:
    """A protocol: the task that it is for, whether it reads patch tokens, what it computes, and whether by default."""

    task: str
    dense: bool
    run: Callable[[ProtocolInput], Scores]
    default: bool = True  # False: several passes over the images


@dataclass(frozen=True)
class Comparison:
    """Scores of each model, the first is the one that is asked about."""

    evalset: Evalset
    scores: dict[str, Scores]
    tokens: dict[str, Tokens] = field(repr=False)
    protocols: tuple[str, ...]


PROTOCOLS: Mapping[str, Protocol] = {
    "knn": Protocol("classification", dense=False, run=knn.run),
    "linear": Protocol("classification", dense=False, run=linear.run),
    "probe": Protocol("classification", dense=False, run=probe.run),
    "retrieval": Protocol("retrieval", dense=False, run=retrieval.run),
    "retrieval-ms": Protocol("retrieval", dense=False, run=retrieval.run_multi_scale, default=False),
    "segmentation": Protocol("segmentation", dense=True, run=segmentation.run),
    "segmentation-lin4": Protocol("segmentation", dense=True, run=segmentation.run_four_layers),
    "segmentation-ms": Protocol("segmentation", dense=True, run=segmentation.run_multi_scale, default=False),
    "depth": Protocol("depth", dense=True, run=depth.run),
    "depth-lin4": Protocol("depth", dense=True, run=depth.run_four_layers),
}


def compare(
    evalset: Evalset,
    models: Sequence[ComparedModel],
    protocols: Sequence[str],
    settings: Settings,
    cache: Path,
    seed: int,
) -> Comparison:
    """Measure each model by each protocol.

    Args:
        evalset: the images with what the task needs.
        models: the first is the one that is asked about.
        protocols: names; empty means all of the set's task but `robustness` and others of several passes.
        settings: of the protocols.
        cache: folder of tokens.
        seed: of the protocols' random choices.

    Raises:
        ConfigError: two models of one name, an unknown protocol, or one of another task.
        DatasetError: a set that a protocol cannot measure.
    """
    if twice := sorted(name for name, count in Counter(model.name for model in models).items() if count > 1):
        raise ConfigError(f"{twice[0]}: two models of one name; give each once, and ./{twice[0]} for a folder")
    chosen = _chosen(evalset, protocols)
    dense = any(protocol.dense for protocol in chosen.values())
    tokens = {model.name: _tokens(evalset, model, settings.loading, dense, cache) for model in models}
    scores: dict[str, Scores] = {}
    for model in models:
        found = scores[model.name] = Scores()
        given = _given(evalset, model, tokens[model.name], settings, cache, seed)
        for name, protocol in chosen.items():
            if protocol.dense and given.tokens.patches is None:
                log.info("%s has no patch features: not measured by %s", model.name, name)
                continue
            found.update(protocol.run(given))
        _add_slices(found, given)
        features = given.tokens.features
        found.metrics |= {"effective_rank": effective_rank(features), "feature_std": feature_std(features)}
    compared = Comparison(evalset, scores, tokens, (*chosen, *([ROBUSTNESS] if ROBUSTNESS in protocols else [])))
    if ROBUSTNESS in protocols:
        _add_robustness(compared, models, settings, cache, seed)
    return compared


def _add_slices(scores: Scores, given: ProtocolInput) -> None:
    """Add classes, groups, the worst group and the gap of each column, of the first accuracy that was measured."""
    test, labels = given.evalset.test, given.evalset.images.labels
    columns = {name: values[test].tolist() for name, values in given.evalset.groups.items()}
    accuracies = [metric for metric, values in scores.by_image.items() if is_accuracy(values)]
    if not accuracies or len(scores.by_image[accuracies[0]]) != len(test):
        return
    metric, correct = accuracies[0], scores.by_image[accuracies[0]]
    if labels is not None:
        classes = [labels.classes[target] for target in labels.targets[test]]
        scores.parts[f"{metric} of each class"] = slices.group_accuracies(correct, classes, "class")
    found = slices.evaluate(correct, columns, given.settings.slices)
    found.parts = {f"{metric} by {column}": parts for column, parts in found.parts.items()}
    scores.update(found)


def _chosen(evalset: Evalset, names: Sequence[str]) -> dict[str, Protocol]:
    task = "classification" if evalset.config.task == "video" else evalset.config.task
    fitting = {name: protocol for name, protocol in PROTOCOLS.items() if protocol.task == task}
    known = [*fitting, ROBUSTNESS] if evalset.config.task == "classification" else [*fitting]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--protocol {name}: {evalset.folder.parent.name} is a set of task {evalset.config.task}, for which "
                f"there are {', '.join(known)}"
            )
    if not names:
        return {name: protocol for name, protocol in fitting.items() if protocol.default}
    return {name: fitting[name] for name in names if name in fitting}


def _add_robustness(
    found: Comparison, models: Sequence[ComparedModel], settings: Settings, cache: Path, seed: int
) -> None:
    """Add the accuracy of nearest neighbors under 75 corruptions, and mCE against the random weights."""
    results = {}
    for model in models:
        given = _given(found.evalset, model, found.tokens[model.name], settings, cache, seed)
        images = partial(_corrupted_features, given, model, cache)
        results[model.name] = corrupted_results(given, images)
    for name, scores in found.scores.items():
        scores.update(robustness.evaluate(results[name], results[RANDOM]))


def _corrupted_features(
    given: ProtocolInput, model: ComparedModel, cache: Path, name: str, severity: int
) -> NDArray[np.float32]:
    """Return the features of all test images under one corruption, [T, D]."""
    evalset, seed = given.evalset, given.seed
    crops = EvaluationImages(evalset.images, model.preprocessing)
    images = CorruptedImages(crops, evalset.test, (name, severity), seed)
    version = f"{evalset.version} test {name} {severity} {seed}"
    request = TokenRequest(images, version, model.preprocessing, given.settings.loading)
    return _tokens_of(request, model, cache).features


def _given(
    evalset: Evalset, model: ComparedModel, tokens: Tokens, settings: Settings, cache: Path, seed: int
) -> ProtocolInput:
    def find(preprocessing: Preprocessing, rows: NDArray[np.int64]) -> Tokens:
        images = Subset(EvaluationImages(evalset.images, preprocessing), rows.tolist())
        version = f"{evalset.version} {hashlib.sha256(rows.tobytes()).hexdigest()}"
        dense = tokens.patches is not None
        return _tokens_of(TokenRequest(images, version, preprocessing, settings.loading, dense), model, cache)

    return ProtocolInput(model.name, evalset, tokens, model.preprocessing, settings, seed, find)


def _tokens(evalset: Evalset, model: ComparedModel, loading: Loading, dense: bool, cache: Path) -> Tokens:
    """Return the tokens of all images; those of another set's train images are that set's, for all that need them."""
    if evalset.clips is not None:
        frames = EvaluationImages(evalset.clips.frames, model.preprocessing)
        request = TokenRequest(frames, evalset.version, model.preprocessing, loading, dense)
        joint = evalset.config.clip_features == "concatenated"
        return of_clips(_tokens_of(request, model, cache), evalset.clips.rows, joint=joint)
    images = EvaluationImages(evalset.images, model.preprocessing)
    if evalset.learned is not None:
        learned = _tokens(evalset.learned, model, loading, dense, cache)
        own = Subset(images, evalset.test.tolist())
        request = TokenRequest(own, evalset.version, model.preprocessing, loading, dense)
        return joined(learned, evalset.learned.train, _tokens_of(request, model, cache))
    return _tokens_of(TokenRequest(images, evalset.version, model.preprocessing, loading, dense), model, cache)


def _tokens_of(request: TokenRequest, model: ComparedModel, cache: Path) -> Tokens:
    if model.backbone is None:
        features = np.stack([describe(request.images[index].numpy()) for index in range(len(request.images))])
        return Tokens(features[:, None], features, None, 0)
    return find_tokens(model.backbone, model.digest, request, cache)


def load_model(name: str, folder: Path, scaling: Callable[[ViTConfig], Preprocessing]) -> ComparedModel:
    """Read a model's weights for a comparison.

    Args:
        name: for a person.
        folder: with model.safetensors and config.json.
        scaling: of the images, given the backbone's shape.

    Raises:
        WeightsError: the weights cannot be read.
    """
    backbone = load_backbone(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    return ComparedModel(name, sha256_file(folder / BACKBONE_FILE), backbone, scaling(backbone.config))


def baselines(first: ComparedModel, seed: int) -> list[ComparedModel]:
    """Return the baselines as compared models: random weights of a model's shape, and the descriptor."""
    assert first.backbone is not None
    network = random_network(first.backbone.config, seed).to(next(first.backbone.parameters()).device)
    digest = f"{RANDOM} {seed} {network.config.model_dump_json()}"
    return [
        ComparedModel(RANDOM, digest, network, first.preprocessing),
        ComparedModel(DESCRIPTOR, DESCRIPTOR, None, first.preprocessing),
    ]
