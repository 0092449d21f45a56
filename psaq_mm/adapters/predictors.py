# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The layers whose output is the model's: found by running it, not by their names."""
from collections import defaultdict
from contextlib import ExitStack
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Set

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psaq_mm.modes import evaluating


def layers_of(model: nn.Module) -> Dict[str, nn.Module]:
    """Modules that multiply by a weight of their own, by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            or getattr(module._parameters.get('weight'), 'ndim', 0) > 1}


def last_layers(model: nn.Module, forward: Callable[[], Any],
                outside: Callable[[str], bool]) -> FrozenSet[str]:
    """Names of the last layers before the outputs of a model.

    These are the layers that an output comes from with no other layer in
    between, and those whose output no other layer takes in: what an RPN scores
    is no output of a detector, but nothing with weights comes after it. autograd's
    graph of one forward pass tells both. The model is left as it was.

    Args:
        model (nn.Module): The float model.
        forward (Callable): Runs it, and returns its outputs.
        outside (Callable): Whether the layer of a name, in a backbone or neck,
            is not counted where nothing takes in its output.

    Returns:
        frozenset[str]: The names.
    """
    layers = layers_of(model)
    made_by: Dict[Any, Set[str]] = defaultdict(set)  # keeps the nodes alive, and so their identity
    inputs: List[Any] = []

    def note(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            inputs.extend(_nodes((args, kwargs)))
            # A copy, so that what changes an output in place leaves the node as it is.
            copied = output.clone() if isinstance(output, Tensor) else output
            for node in _nodes(copied):
                made_by[node].add(name)
            return copied
        return hook

    with ExitStack() as hooks, torch.random.fork_rng(
            {p.device for p in model.parameters() if p.device.type == 'cuda'}):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(note(name), with_kwargs=True))
        with evaluating(model, gradients=True), torch.enable_grad(), _CopiesInGraph():
            outputs = forward()
    run = set().union(*made_by.values())
    unread = run - _nearest(inputs, made_by)
    return frozenset(_nearest(_nodes(outputs), made_by)
                     | {name for name in unread if not outside(name)})


class _CopiesInGraph(TorchFunctionMode):
    """A deep copy of what was computed is a clone: hosts copy features, as GLIP does for
    each part of a long list of classes, and torch refuses that while it records a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Optional[Dict[str, Any]] = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def layers_that_run(model: nn.Module, forward: Callable[[], Any]) -> FrozenSet[str]:
    """Names of the layers that a forward pass calls. The model is left as it was.

    Args:
        model (nn.Module): The float model.
        forward (Callable): Runs it.
    """
    run: Set[str] = set()
    with ExitStack() as hooks:
        for name, layer in layers_of(model).items():
            hooks.enter_context(layer.register_forward_hook(
                lambda module, args, output, name=name: run.add(name)))
        with evaluating(model), torch.no_grad():
            forward()
    return frozenset(run)


def layers_of_own_width(model: nn.Module, head_of: Callable[[str], str]) -> FrozenSet[str]:
    """Names of layers of heads whose output is as wide as no input of their head.

    What is left where a model cannot be run, for want of texts or annotations:
    as a rule no layer takes in as many channels as there are classes or sides of boxes.

    Args:
        model (nn.Module): The float model.
        head_of (Callable): Name of a layer to that of the head it is in; empty
            if it is in none.

    Returns:
        frozenset[str]: The names.
    """
    heads: Dict[str, Dict[str, nn.Module]] = defaultdict(dict)
    for name, layer in layers_of(model).items():
        if head_of(name):
            heads[head_of(name)][name] = layer
    return frozenset(name for layers in heads.values() for name, layer in layers.items()
                     if _width(layer, 'out') is not None and _width(layer, 'out') not in
                     {_width(other, 'in') for other in layers.values()})


def _width(layer: nn.Module, side: str) -> Any:
    return getattr(layer, f'{side}_channels', getattr(layer, f'{side}_features', None))


def _nearest(start: Iterable[Any], made_by: Dict[Any, Set[str]]) -> Set[str]:
    """The first layers on every way back from nodes of autograd's graph."""
    found: Set[str] = set()
    seen: Set[Any] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in made_by:
            found |= made_by[node]
            continue
        before = [edge[0] for edge in node.next_functions if edge[0] is not None]
        # Boxes only say where a RoI layer cuts; what goes on are the features.
        waiting += before[:1] if 'roi' in node.name().lower() else before
    return found


def _nodes(value: Any) -> Iterator[Any]:
    """Nodes of autograd's graph that the tensors of a nested value come from."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value.grad_fn
    elif isinstance(value, dict):
        yield from _nodes(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _nodes(one)
    elif hasattr(value, 'values') and callable(value.values):  # mmengine's data elements
        yield from _nodes(list(value.values()))
