# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which weights of a checkpoint are those of a model: of several models or averages, one."""
import re
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import Adapter
from psaq_mm.errors import UserError

from .safe_load import extract_state_dict

PLACES = ('state_dict', 'model', 'module')
"""Where weights stand as a rule; what stands elsewhere comes second."""

WRAPPERS = ('module', '_orig_mod', '_forward_module', '_fsdp_wrapped_module',
            '_checkpoint_wrapped_module')
"""Parts of names that wrappers of torch and DeepSpeed add, anywhere in a name."""

AVERAGED = re.compile(r'(?:^|[._])(?:\w*ema|ema\w*|swa|avg|average|averaged|shadow\w*|polyak\w*)'
                      r'(?:[._]|$)', re.IGNORECASE)
"""What the places and prefixes of averaged weights are called."""


@dataclass(frozen=True)
class WeightChoice:
    """Which weights are taken of a checkpoint that holds several.

    Args:
        averaged (bool, optional): Averaged weights, or those that training ended with.
            Defaults to None: averaged ones, where there are any.
        prefix (str, optional): What the keys of the model begin with, such as ``student``
            or ``teacher``. Defaults to None: what fits, which must be one.
    """
    averaged: Optional[bool] = None
    prefix: Optional[str] = None

    def refuse(self, path: str) -> None:
        """Raise if a choice was made, for a file that leaves none.

        Raises:
            UserError: If so.
        """
        if self != WeightChoice():
            raise UserError(f'{path} is quantized and holds one set of weights: leave out --ema, '
                            '--raw and --prefix')


@dataclass(frozen=True)
class _Candidate:
    """Weights of the model by name, and where they stand."""
    place: str
    prefix: str
    state: Dict[str, Tensor]
    averaged: bool

    def __str__(self) -> str:
        return '.'.join(filter(None, (self.place, self.prefix.rstrip('.')))) or 'the top'


def find_weights(model: nn.Module, adapter: Optional[Adapter], checkpoint: Any, path: str,
                 choice: Optional[WeightChoice] = None) -> Dict[str, Tensor]:
    """Find the weights of a model in a loaded checkpoint.

    They may stand under any key; prefixes of wrappers and of larger models are removed. The
    log says what was chosen where there was a choice.

    Args:
        model (nn.Module): The float model.
        adapter (Adapter, optional): Its adapter; None if none serves it.
        checkpoint (Any): What :func:`load_checkpoint_file` returned.
        path (str): Its name, for messages.
        choice (WeightChoice, optional): What is wanted. Defaults to None: no matter.

    Returns:
        dict[str, Tensor]: Weights by name, in the layout of the file.

    Raises:
        UserError: If there are none, what was chosen is not there, or several models are.
    """
    choice = choice or WeightChoice()
    found = [] if adapter is None else _candidates(model, adapter, checkpoint)
    if choice.prefix is not None:
        prefix = choice.prefix.strip('.')
        kept = [one for one in found if prefix in (one.prefix.strip('.'), str(one))]
        if not kept:
            raise UserError(f'{path}: --prefix {choice.prefix}: no such weights of the model; '
                            f'found: {", ".join(map(str, found)) or "none"}')
        found = kept
    if not found:
        if choice.averaged:
            raise UserError(f'{path}: --ema: no averaged weights of the model were found')
        return extract_state_dict(checkpoint, path)
    groups = {kind: [one for one in found if one.averaged is kind] for kind in (True, False)}
    wanted = choice.averaged if choice.averaged is not None else bool(groups[True])
    if not groups[wanted]:
        if wanted:
            raise UserError(f'{path}: --ema: no averaged weights of the model were found, only '
                            f'{found[0]}')
        raise UserError(f'{path}: --raw: only averaged weights of the model were found: '
                        f'{found[0]}')
    one = _only(groups[wanted], path)
    state = one.state
    if groups[not wanted]:
        other = groups[not wanted][0]
        print_log(f'{path}: {"averaged" if wanted else "raw"} weights ({one}) are taken, not the '
                  f'{"raw" if wanted else "averaged"} ones ({other}); '
                  f'{"--raw" if wanted else "--ema"} takes those', logger='current')
        buffers = dict(model.named_buffers())  # some averages are of parameters alone
        state = {**{k: v for k, v in other.state.items() if k in buffers}, **state}
    elif one.prefix or one.place not in ('', *PLACES):
        print_log(f'{path}: the weights are taken from {one}', logger='current')
    return state


def _only(found: List[_Candidate], path: str) -> _Candidate:
    """The one candidate, or the first at a usual place.

    Raises:
        UserError: If there are several models.
    """
    first = min(found, key=lambda one: (bool(one.prefix), PLACES.index(one.place)
                                        if one.place in PLACES else len(PLACES)))
    usual = not first.prefix and first.place in ('', *PLACES)
    if len(found) > 1 and not usual:
        names = sorted({(one.prefix.rstrip('.') or str(one)) for one in found})
        raise UserError(f'{path} holds {len(found)} models with a Swin: {", ".join(names)}. '
                        f'Choose one by --prefix, such as --prefix {names[-1]} (in Python: '
                        'prefix=)')
    return first


def _candidates(model: nn.Module, adapter: Adapter, checkpoint: Any) -> List[_Candidate]:
    """All weights in a checkpoint that are in a layout of the model."""
    own = {part for key in model.state_dict() for part in key.split('.')}
    wrappers = [part for part in WRAPPERS if part not in own]
    found: List[_Candidate] = []
    for place, tensors in _places(checkpoint):
        state = _unwrapped(tensors, wrappers)
        prefixes = _prefixes(state, adapter, model)
        for prefix in prefixes:
            others = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
            part = {key[len(prefix):]: value for key, value in state.items()
                    if key.startswith(prefix) and not key.startswith(others)}
            if not adapter.convert_state(model, part)[1]:
                continue
            averaged = bool(AVERAGED.search(f'{place}.{prefix}')) or 'n_averaged' in tensors
            found.append(_Candidate(place, prefix, part, averaged))
            # mmcv 1 keeps the raw weights beside the averaged ones: ema_backbone_norm0_weight
            raw = {key: part[name] for key in part
                   for name in ('ema_' + key.replace('.', '_'), ) if name in part}
            if raw:
                found[-1] = _Candidate(place, prefix, part, True)
                found.append(_Candidate(f'{place} (ema_*)', prefix, {**part, **raw}, False))
    if any(one.place == 'ema_state_dict' and 'steps' in checkpoint['ema_state_dict']
           for one in found):
        # mmengine's EMAHook swaps the two as it saves: state_dict holds the averaged ones.
        found = [_Candidate(one.place, one.prefix, one.state, not one.averaged)
                 if one.place in ('state_dict', 'ema_state_dict') else one for one in found]
    return found


def _places(value: Any, name: str = '', depth: int = 3) -> Iterator[Tuple[str, Dict[str, Tensor]]]:
    """Mappings that hold tensors by name, nested ones too."""
    if not isinstance(value, Mapping):
        return
    tensors = {key: one for key, one in value.items()
               if isinstance(key, str) and isinstance(one, Tensor)}
    if tensors:
        yield name, tensors
    for key, one in value.items() if depth else ():
        if isinstance(key, str):
            yield from _places(one, f'{name}.{key}' if name else key, depth - 1)


def _unwrapped(state: Dict[str, Tensor], wrappers: List[str]) -> Dict[str, Tensor]:
    """Keys without the parts that wrappers add, if they stay different."""
    renamed = {'.'.join(part for part in key.split('.') if part not in wrappers): value
               for key, value in state.items()}
    return renamed if len(renamed) == len(state) else state


def _prefixes(state: Mapping[str, Tensor], adapter: Adapter, model: nn.Module) -> List[str]:
    """What stands before the names of models with a patch embedding."""
    backbone = adapter.backbone_name(model)
    backbone = backbone + '.' if backbone else ''
    leads = [match.group(1) for match in (
        re.fullmatch(r'(|.*\.)patch_embed\.proj(?:ection)?\.weight', key) for key in state)
        if match]
    return [lead[:len(lead) - len(backbone)] if lead.endswith(backbone) else lead
            for lead in leads]
