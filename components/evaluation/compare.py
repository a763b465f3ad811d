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
from torch.utils.data import Subset

from components.core.config import ConfigError
from components.core.intervals import is_accuracy
from components.core.metrics import effective_rank, feature_std
from components.core.storage import sha256_file
from components.data.evalset import Evalset
from components.evaluation.baselines import DESCRIPTOR, RANDOM
from components.evaluation.corrupted import CorruptedImages, corrupted_results
from components.evaluation.encoders import BackboneEncoder, DescriptorEncoder, Encoder
from components.evaluation.features import EvaluationImages
from components.evaluation.protocol_input import Find, ProtocolInput
from components.evaluation.protocols import (
    depth,
    instance,
    knn,
    linear,
    probe,
    retrieval,
    robustness,
    segmentation,
    slices,
)
from components.evaluation.scores import Scores
from components.evaluation.settings import Settings
from components.evaluation.tokens import Loading, TokenRequest, Tokens, find_tokens, joined, of_clips
from components.model.config import LAST_LAYERS, Preprocessing, ViTConfig
from components.model.export import BACKBONE_FILE, load_backbone

ROBUSTNESS = "robustness"
UNLABELED = "images without classes"


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
    """A protocol.

    Attributes:
        task: of its sets; `UNLABELED` for sets without.
        dense: reads patch tokens.
        run: what it computes.
        layers: of which it reads tokens.
        sizes: it reads images of several sizes, so it is measured only when asked for.
    """

    task: str
    dense: bool
    run: Callable[[ProtocolInput], Scores]
    layers: int = 1
    sizes: bool = False


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
    "instance": Protocol(UNLABELED, dense=False, run=instance.run),
    "retrieval": Protocol("retrieval", dense=False, run=retrieval.run),
    "retrieval-ms": Protocol("retrieval", dense=False, run=retrieval.run_multi_scale, sizes=True),
    "segmentation": Protocol("segmentation", dense=True, run=segmentation.run),
    "segmentation-lin4": Protocol("segmentation", dense=True, run=segmentation.run_four_layers, layers=LAST_LAYERS),
    "segmentation-ms": Protocol(
        "segmentation", dense=True, run=segmentation.run_multi_scale, layers=LAST_LAYERS, sizes=True
    ),
    "depth": Protocol("depth", dense=True, run=depth.run),
    "depth-lin4": Protocol("depth", dense=True, run=depth.run_four_layers, layers=LAST_LAYERS),
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
    if ROBUSTNESS in protocols and RANDOM not in {model.name for model in models}:
        raise ConfigError(
            f"--protocol {ROBUSTNESS}: mCE is held against random weights of the shape of {models[0].name}, of which "
            "there are none; name a weights folder first and that one by --against"
        )
    dense = any(protocol.dense for protocol in chosen.values())
    given_to = {model.name: _given(evalset, model, settings, dense, cache, seed) for model in models}
    tokens = {name: given.tokens for name, given in given_to.items()}
    if dense and tokens[models[0].name].patches is None:
        needed = ", ".join(name for name, protocol in chosen.items() if protocol.dense)
        raise ConfigError(f"{needed}: {models[0].name} gives no patch tokens to read; name a model first that does")
    scores = {name: _measured(given, chosen) for name, given in given_to.items()}
    compared = Comparison(evalset, scores, tokens, (*chosen, *([ROBUSTNESS] if ROBUSTNESS in protocols else [])))
    if ROBUSTNESS in protocols:
        _add_robustness(compared, given_to)
    return compared


def _measured(given: ProtocolInput, protocols: Mapping[str, Protocol]) -> Scores:
    """Measure one model by each protocol; those that cannot measure it, or read less of it, are in the notes."""
    found = Scores()
    for name, protocol in protocols.items():
        if lacking := _lacking(protocol, given):
            found.notes[name] = f"not measured: the model {lacking}"
            continue
        found.update(protocol.run(given))
        if (there := given.tokens.cls.shape[1]) < protocol.layers:
            found.notes[name] = f"reads {there} layers, not {protocol.layers}: the model gives no more"
    _add_slices(found, given)
    features = given.tokens.features
    found.metrics |= {"effective_rank": effective_rank(features), "feature_std": feature_std(features)}
    return found


def _lacking(protocol: Protocol, given: ProtocolInput) -> str:
    """Return why a protocol does not measure a model; empty if it does."""
    if protocol.dense and given.tokens.patches is None:
        return "gives no patch tokens"
    return "takes images of its own size only" if protocol.sizes and given.patch_size is None else ""


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


def task_of(evalset: Evalset) -> str:
    """Return the task that a set is measured by; a set of classes that it does not have is measured without them."""
    classes = evalset.config.task == "classification"
    return UNLABELED if classes and evalset.images.labels is None else evalset.config.task


def protocols_for(evalset: Evalset) -> list[str]:
    """Return the names of the protocols that can measure a set; clips are measured as images are."""
    task = task_of(evalset)
    fitting = [name for name, one in PROTOCOLS.items() if one.task == ("classification" if task == "video" else task)]
    return [*fitting, ROBUSTNESS] if task == "classification" else fitting


def _chosen(evalset: Evalset, names: Sequence[str]) -> dict[str, Protocol]:
    known = protocols_for(evalset)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--protocol {name}: {evalset.name} is a set of task {task_of(evalset)}, for which "
                f"there are {', '.join(known)}"
            )
    if not names:
        return {name: one for name in known if (one := PROTOCOLS.get(name)) is not None and not one.sizes}
    return {name: PROTOCOLS[name] for name in names if name in PROTOCOLS}


def _given(
    evalset: Evalset, model: ComparedModel, settings: Settings, dense: bool, cache: Path, seed: int
) -> ProtocolInput:
    def find(request: TokenRequest) -> Tokens:
        return find_tokens(model.encoder, model.digest, request, cache)

    tokens = _tokens(evalset, find, model.preprocessing, settings.loading, dense)
    patch = model.encoder.patch_size
    return ProtocolInput(model.name, evalset, tokens, model.preprocessing, patch, settings, seed, find)


def _add_robustness(found: Comparison, given_to: Mapping[str, ProtocolInput]) -> None:
    """Add the accuracy of nearest neighbors under 75 corruptions, and mCE against the random weights."""
    results = {name: corrupted_results(given, partial(_corrupted_features, given)) for name, given in given_to.items()}
    for name, scores in found.scores.items():
        scores.update(robustness.evaluate(results[name], results[RANDOM]))


def _corrupted_features(given: ProtocolInput, name: str, severity: int) -> NDArray[np.float32]:
    """Return the features of all test images under one corruption, [T, D]."""
    crops = EvaluationImages(given.evalset.images, given.preprocessing)
    images = CorruptedImages(crops, given.evalset.test, (name, severity), given.seed)
    return given.features_of(images, f"test {name} {severity} {given.seed}")


def _tokens(evalset: Evalset, find: Find, preprocessing: Preprocessing, loading: Loading, dense: bool) -> Tokens:
    """Return the tokens of all images; those of another set's train images are that set's, for all that need them."""
    if evalset.clips is not None:
        frames = EvaluationImages(evalset.clips.frames, preprocessing)
        joint = evalset.config.clip_features == "concatenated"
        found = find(TokenRequest(frames, evalset.version, preprocessing, loading, dense))
        return of_clips(found, evalset.clips.rows, joint=joint)
    images = EvaluationImages(evalset.images, preprocessing)
    if evalset.learned is not None:
        learned = _tokens(evalset.learned, find, preprocessing, loading, dense)
        own = Subset(images, evalset.test.tolist())
        found = find(TokenRequest(own, evalset.version, preprocessing, loading, dense))
        return joined(learned, evalset.learned.train, found)
    return find(TokenRequest(images, evalset.version, preprocessing, loading, dense))


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
