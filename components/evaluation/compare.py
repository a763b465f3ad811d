"""Compare models on one evaluation set by the protocols of its task; each protocol is a file of `protocols`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from components.core.config import ConfigError
from components.core.intervals import is_accuracy
from components.core.metrics import effective_rank, feature_std
from components.core.storage import sha256_file
from components.data.evalset import Evalset
from components.evaluation.baselines import DESCRIPTOR, RANDOM
from components.evaluation.corrupted import CorruptedImages, corrupted_results
from components.evaluation.encoders import LAYERS, BackboneEncoder, DescriptorEncoder, Encoder
from components.evaluation.features import EvaluationImages
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.protocols import depth, knn, linear, probe, retrieval, robustness, segmentation, slices
from components.evaluation.scores import Scores
from components.evaluation.settings import Settings
from components.evaluation.tokens import Loading, TokenRequest, Tokens, find_tokens
from components.model.config import Preprocessing, ViTConfig
from components.model.export import BACKBONE_FILE, load_backbone

ROBUSTNESS = "robustness"


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        name: for a person.
        digest: of its weights.
        encoder: of the set's images.
        preprocessing: of these.
    """

    name: str
    digest: str
    encoder: Encoder
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Protocol:
    """A protocol: the task that it is for, whether it reads patch tokens, what it computes, and of how many layers."""

    task: str
    dense: bool
    run: Callable[[ProtocolInput], Scores]
    layers: int = 1


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
    "segmentation": Protocol("segmentation", dense=True, run=segmentation.run),
    "segmentation-lin4": Protocol("segmentation", dense=True, run=segmentation.run_four_layers, layers=LAYERS),
    "depth": Protocol("depth", dense=True, run=depth.run),
    "depth-lin4": Protocol("depth", dense=True, run=depth.run_four_layers, layers=LAYERS),
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
        protocols: names; empty means all of the set's task but `robustness`, which takes 75 passes.
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
    if ROBUSTNESS in protocols and RANDOM not in {model.name for model in models}:
        raise ConfigError(
            f"--protocol {ROBUSTNESS}: mCE is held against random weights of the shape of {models[0].name}, of which "
            "there are none; name a weights folder first and that one by --against"
        )
    dense = any(protocol.dense for protocol in chosen.values())
    tokens = {model.name: _tokens(evalset, model, settings.loading, dense, cache) for model in models}
    if dense and tokens[models[0].name].patches is None:
        needed = ", ".join(name for name, protocol in chosen.items() if protocol.dense)
        raise ConfigError(f"{needed}: {models[0].name} gives no patch tokens to read; name a model first that does")
    scores: dict[str, Scores] = {}
    for model in models:
        found = scores[model.name] = Scores()
        given = ProtocolInput(model.name, evalset, tokens[model.name], model.preprocessing, settings, seed)
        for name, protocol in chosen.items():
            if protocol.dense and given.tokens.patches is None:
                found.notes[name] = "not measured: the model gives no patch tokens"
                continue
            found.update(protocol.run(given))
            if (there := given.tokens.cls.shape[1]) < protocol.layers:
                found.notes[name] = f"reads {there} layers, not {protocol.layers}: the model gives no more"
        _add_slices(found, given)
        features = given.tokens.features
        found.metrics |= {"effective_rank": effective_rank(features), "feature_std": feature_std(features)}
    compared = Comparison(evalset, scores, tokens, (*chosen, *([ROBUSTNESS] if ROBUSTNESS in protocols else [])))
    if ROBUSTNESS in protocols:
        _add_robustness(compared, models, settings, cache, seed)
    return compared


def _add_slices(scores: Scores, given: ProtocolInput) -> None:
    """Add the worst group and the gap of each column, of the first accuracy that was measured."""
    columns = {name: values[given.evalset.test].tolist() for name, values in given.evalset.groups.items()}
    accuracies = [values for metric, values in scores.by_image.items() if is_accuracy(values)]
    if columns and accuracies and len(accuracies[0]) == len(given.evalset.test):
        scores.update(slices.evaluate(accuracies[0], columns, given.settings.slices))


def _chosen(evalset: Evalset, names: Sequence[str]) -> dict[str, Protocol]:
    fitting = {name: protocol for name, protocol in PROTOCOLS.items() if protocol.task == evalset.config.task}
    known = [*fitting, ROBUSTNESS] if evalset.config.task == "classification" else [*fitting]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--protocol {name}: {evalset.folder.parent.name} is a set of task {evalset.config.task}, for which "
                f"there are {', '.join(known)}"
            )
    return {name: fitting[name] for name in names if name in fitting} if names else fitting


def _add_robustness(
    found: Comparison, models: Sequence[ComparedModel], settings: Settings, cache: Path, seed: int
) -> None:
    """Add the accuracy of nearest neighbors under 75 corruptions, and mCE against the random weights."""
    results = {}
    for model in models:
        given = ProtocolInput(model.name, found.evalset, found.tokens[model.name], model.preprocessing, settings, seed)
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
    return find_tokens(model.encoder, model.digest, request, cache).features


def _tokens(evalset: Evalset, model: ComparedModel, loading: Loading, dense: bool, cache: Path) -> Tokens:
    images = EvaluationImages(evalset.images, model.preprocessing)
    request = TokenRequest(images, evalset.version, model.preprocessing, loading, dense)
    return find_tokens(model.encoder, model.digest, request, cache)


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
    digest = sha256_file(folder / BACKBONE_FILE)
    return ComparedModel(name, digest, BackboneEncoder(backbone), scaling(backbone.config))


def baselines(first: ComparedModel, seed: int) -> list[ComparedModel]:
    """Return the baselines as compared models: random weights of a model's shape if it has one, and the descriptor.

    The descriptor has the patch grid of the model, or that of usual patches where it has none.
    """
    encoder, size = first.encoder, first.preprocessing
    descriptor = DescriptorEncoder(encoder.encode_black(size.crop_size).rows(size.crop_size))
    found = [ComparedModel(DESCRIPTOR, descriptor.shape, descriptor, size)]
    if (network := encoder.untrained(seed)) is not None:
        found.insert(0, ComparedModel(RANDOM, f"{RANDOM} {seed} {network.shape}", network, size))
    return found
