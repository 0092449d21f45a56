# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The ``psaq_mm`` scope: every exchangeable part is registered here.

The first five registries are children of mmengine's, so any OpenMMLab config
may say ``type='psaq_mm.QuantizedCheckpointHook'``; mmengine then imports this
module by itself, and ``locations`` makes it import the parts, so configs need
no ``custom_imports``. The others are roots: they exist in this project alone.
"""
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry

HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='psaq_mm', locations=['psaq_mm.engine.hooks'])
"""Hooks around the phases of a quantization run, and around checkpoints."""

RUNNERS = Registry(
    'runner', parent=MMENGINE_RUNNERS, scope='psaq_mm', locations=['psaq_mm.engine.runner'])
"""The runner of a quantization."""

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='psaq_mm',
    locations=['psaq_mm.classification', 'psaq_mm.engine.checkpoint_model'])
"""Models of libraries that do not know mmengine, and models that bring their weights."""

DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='psaq_mm', locations=['psaq_mm.classification'])
"""Data sets to evaluate those models on."""

METRICS = Registry(
    'metric', parent=MMENGINE_METRICS, scope='psaq_mm', locations=['psaq_mm.classification'])
"""What is measured on those data sets."""

OBSERVERS = Registry(
    'observer', scope='psaq_mm', locations=['psaq_mm.quantization.observers'])
"""Range rules: what a tensor's values say about its quantization range."""

QUANT_OPS = Registry(
    'quant_op', scope='psaq_mm', locations=['psaq_mm.ops', 'psaq_mm.adapters'])
"""Quantized counterparts of float modules, by their own name. Register with
:func:`psaq_mm.ops.register_op`, which also notes the classes they replace."""

PRIORS = Registry('prior', scope='psaq_mm', locations=['psaq_mm.prior'])
"""Terms of the loss that images are synthesized with."""

ADAPTERS = Registry('adapter', scope='psaq_mm', locations=['psaq_mm.adapters'])
"""What differs between host libraries: where attention, norms and inputs are."""
