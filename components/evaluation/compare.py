"""Compare models on one evaluation set by the protocols of its task; each protocol is a file of `protocols`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from components.core.config import ConfigError
from components.core.intervals import is_accuracy
from components.core.metrics import effective_rank, feature_std
from components.data.evalset import Evalset
from components.evaluation.descriptor import describe
from components.evaluation.features import EvaluationImages
from components.evaluation.protocols import depth, knn, linear, probe, retrieval, segmentation, slices
from components.evaluation.scores import Scores
from components.evaluation.settings import Settings
from components.evaluation.subject import Subject
from components.evaluation.tokens import TokenRequest, Tokens, find_tokens
from components.model.config import Preprocessing
from components.model.vit import VisionTransformer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contestant:
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


@dataclass(frozen=True)
class Protocol:
    """A protocol: the task that it is for, whether it reads patch tokens, and what it computes."""

    task: str
    dense: bool
    run: Callable[[Subject], Scores]


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
    "segmentation-lin4": Protocol("segmentation", dense=True, run=segmentation.run_four_layers),
    "depth": Protocol("depth", dense=True, run=depth.run),
    "depth-lin4": Protocol("depth", dense=True, run=depth.run_four_layers),
}


def compare(
    evalset: Evalset, models: Sequence[Contestant], protocols: Sequence[str], settings: Settings, cache: Path, seed: int
) -> Comparison:
    """Measure each model by each protocol.

    Args:
        evalset: the images with what the task needs.
        models: the first is the one that is asked about.
        protocols: names; empty means all of the set's task.
        settings: of the protocols.
        cache: folder of tokens.
        seed: of the protocols' random choices.

    Raises:
        ConfigError: an unknown protocol, or one of another task.
        DatasetError: a set that a protocol cannot measure.
    """
    chosen = _chosen(evalset, protocols)
    tokens = {model.name: _tokens(evalset, model, any(p.dense for p in chosen.values()), cache) for model in models}
    scores: dict[str, Scores] = {}
    for model in models:
        found = scores[model.name] = Scores()
        subject = Subject(model.name, evalset, tokens[model.name], model.preprocessing, settings, seed)
        for name, protocol in chosen.items():
            if protocol.dense and subject.tokens.patches is None:
                log.info("%s has no patch features: not measured by %s", model.name, name)
                continue
            found.update(protocol.run(subject))
        _add_slices(found, subject)
        features = subject.tokens.features
        found.metrics |= {"effective_rank": effective_rank(features), "feature_std": feature_std(features)}
    return Comparison(evalset, scores, tokens, tuple(chosen))


def _add_slices(scores: Scores, subject: Subject) -> None:
    """Add the worst group and the gap of each column, of the first accuracy that was measured."""
    columns = {name: values[subject.evalset.test].tolist() for name, values in subject.evalset.groups.items()}
    accuracies = [values for metric, values in scores.by_image.items() if is_accuracy(values)]
    if columns and accuracies and len(accuracies[0]) == len(subject.evalset.test):
        scores.update(slices.evaluate(accuracies[0], columns, subject.settings.slices))


def _chosen(evalset: Evalset, names: Sequence[str]) -> dict[str, Protocol]:
    fitting = {name: protocol for name, protocol in PROTOCOLS.items() if protocol.task == evalset.config.task}
    for name in names:
        if name not in fitting:
            raise ConfigError(
                f"--protocol {name}: {evalset.folder.parent.name} is a set of task {evalset.config.task}, for which "
                f"there are {', '.join(fitting)}"
            )
    return {name: fitting[name] for name in names} if names else fitting


def _tokens(evalset: Evalset, model: Contestant, dense: bool, cache: Path) -> Tokens:
    images = EvaluationImages(evalset.images, model.preprocessing)
    if model.backbone is None:
        features = np.stack([describe(images[index].numpy()) for index in range(len(images))])
        return Tokens(features[:, None], features, None, 0)
    request = TokenRequest(images, evalset.version, model.preprocessing, dense)
    return find_tokens(model.backbone, model.digest, request, cache)


def random_twin(backbone: VisionTransformer, seed: int) -> VisionTransformer:
    """Return an untrained network of the same shape, on the same device.

    With the small initial LayerScale the class token hardly depends on the image, so that logistic regression is at
    chance. With a LayerScale of 1 the random blocks contribute, which makes a meaningful baseline.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = VisionTransformer(backbone.config.model_copy(update={"layer_scale_init": 1.0}))
    return made.eval().to(next(backbone.parameters()).device)
