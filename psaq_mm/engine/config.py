# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""OpenMMLab configs, and the recipe that is in one."""
import difflib
import importlib.util
import logging
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook

from psaq_mm.errors import UserError
from psaq_mm.recipe import Recipe
from psaq_mm.recipe.merging import DELETE
from psaq_mm.registry import HOOKS
from psaq_mm.sections import nearest

SECTIONS = tuple(field.name for field in fields(Recipe))
"""Keys of a config that are sections of the recipe: what they change of the shipped one."""

KEYS = (*SECTIONS, 'recipe', 'preset')
"""All keys of ours."""

OPTIONAL_KEYS = ('work_dir', 'log_level', 'default_scope', 'default_hooks', 'custom_hooks',
                 'custom_imports', 'visualizer', 'experiment_name', 'env_cfg', 'randomness')
"""Keys of mmengine that a config need not have, and an option may set."""

# mmengine looks a config package up by its distribution's name. Those of the
# onedl family differ from what it knows, and ours it does not know at all; an
# import name serves both families.
MODULE2PACKAGE['mmseg'] = 'mmseg'
MODULE2PACKAGE['psaq_mm'] = 'psaq_mm'


@contextmanager
def _keeping_deletions() -> Iterator[None]:
    """Within the block, merging configs keeps ``_delete_=True`` in our sections.

    mmengine drops it once it has replaced what a base *file* says. The shipped recipe is
    below all files: the mark must stay until the recipe is read.
    """
    original = Config._merge_a_into_b

    def merge(a: Any, b: Any, allow_list_keys: bool = False) -> Any:
        deletions = [path for section in SECTIONS if isinstance(a, Mapping)
                     for path in _deletions(a.get(section), (section, ))]
        result = original(a, b, allow_list_keys)
        for path in deletions:
            part = result
            for key in path:
                part = part[key]
            part[DELETE] = True
        return result

    Config._merge_a_into_b = staticmethod(merge)
    try:
        yield
    finally:
        Config._merge_a_into_b = staticmethod(original)


def _deletions(values: Any, path: Sequence[str]) -> List[Tuple[str, ...]]:
    """Paths of dicts that replace the ones below them."""
    if not isinstance(values, Mapping):
        return []
    found = [tuple(path)] if values.get(DELETE) else []
    for key, value in values.items():
        found += _deletions(value, (*path, key))
    return found


def load_config(path: Union[str, Path], options: Optional[Dict[str, Any]] = None) -> Config:
    """Read a config file; ``psaq_mm::`` and ``mmseg::`` bases resolve.

    Args:
        path (str or Path): The config file, or the name of one that a package ships, such as
            ``psaq_mm::mask_rcnn_swin_t_w8a8.py``.
        options (dict, optional): Dotted keys to values, as from
            ``--cfg-options``. Defaults to None.

    Returns:
        Config: The merged config.

    Raises:
        UserError: If a file is missing or cannot be parsed.
    """
    path = _locate(path)
    if path.suffix in ('.pth', '.pt', '.safetensors'):
        raise UserError(f'config {path} looks like a checkpoint; the config comes first, then '
                        'the checkpoint')
    if not path.is_file():
        raise UserError(f'config {path} does not exist; expected a Python config file such as '
                        'configs/mask_rcnn_swin_t_w8a8.py')
    try:
        with _keeping_deletions():
            config = Config.fromfile(str(path))
            if options:
                reject_new_keys(config, options)
                config.merge_from_dict(options)
    except UserError:
        raise
    except Exception as error:  # configs are programs: anything may be raised
        reason = ' '.join(str(error).split())[:500]
        if '.mim' in reason:
            reason += '. Is psaq_mm installed? Run make, or pip install it.'
        if 'Duplicate key is not allowed among bases' in reason:
            reason += ('. A config that sets one of them itself cannot have our base: inherit '
                       "that one alone, and write recipe = 'w8a8' (docs/configuration.md)")
        raise UserError(f'config {path} cannot be read ({type(error).__name__}): {reason}') \
            from error
    if config.get('model') is None:
        raise UserError(f"config {path} has no key 'model'; inherit the config that the "
                        'checkpoint was trained with')
    _reject_misspelt_sections(config)
    level = config.get('log_level', 'INFO')
    if not isinstance(logging.getLevelName(level), int) and not isinstance(level, int):
        raise UserError(f'log_level must be one of DEBUG, INFO, WARNING, ERROR, got {level!r}')
    return config


def _locate(path: Union[str, Path]) -> Path:
    """The file of a config, which a package may ship as ``package::name``."""
    package, _, name = str(path).partition('::')
    if not name:
        return Path(path)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'config {path}: no package {package!r} is installed')
    return Path(spec.submodule_search_locations[0]) / '.mim' / 'configs' / name


def custom_hooks(config: Config) -> List[Any]:
    """The ``custom_hooks`` of a config: dicts with a type, or hooks.

    Raises:
        UserError: If they are something else.
    """
    hooks = config.get('custom_hooks') or []
    if not isinstance(hooks, (list, tuple)):
        raise UserError(f'custom_hooks must be a list of hooks, got {hooks!r}')
    for hook in hooks:
        kind = hook.get('type') if isinstance(hook, Mapping) else None
        if not isinstance(hook, Hook) and not isinstance(kind, (str, type)):
            raise UserError(f'custom_hooks: {hook!r} names no type of hook')
    return list(hooks)


def hook_class(hook: Any, scope: str) -> Optional[type]:
    """The class of a hook that is registered here, in a host or in mmengine, or None.

    Args:
        hook (Any): A hook, or a dict with its type, a class or a name.
        scope (str): The host's, where names without a scope are looked up too.
    """
    kind = hook.get('type') if isinstance(hook, Mapping) else type(hook)
    if not isinstance(kind, str):
        return kind
    found: Optional[type] = HOOKS.get(kind)
    if found is None:
        with HOOKS.switch_scope_and_registry(scope) as registry:
            found = registry.get(kind)
    return found


def reject_new_keys(config: Config, options: Dict[str, Any]) -> None:
    """An option may change a config's keys, or set one that mmengine knows."""
    known = {*config, *KEYS, *OPTIONAL_KEYS}
    for key in options:
        top = key.split('.')[0]
        if top not in known:
            raise UserError(f'--cfg-options {key}: the config has no key {top!r}.'
                            f'{nearest(top, known)}')


def _reject_misspelt_sections(config: Config) -> None:
    for key in config:
        if key in KEYS:
            continue
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if near:
            raise UserError(f'unknown config key {key!r}. Did you mean {near[0]!r}?')


def has_recipe(config: Config) -> bool:
    """Whether a config has any key of ours."""
    return any(config.get(key) is not None for key in KEYS)


def read_recipe(config: Config) -> Recipe:
    """The recipe of a config: the shipped one that ``recipe`` and ``preset`` name, with what
    the sections change. The config stays as it is.

    Raises:
        UserError: If the config has none of these keys, a key is unknown or a value
            is out of range.
    """
    if not has_recipe(config):
        raise UserError(
            f'config {config.filename} has no recipe; add ours to its bases, '
            "e.g. _base_ = ['my_mask_rcnn_swin.py', 'psaq_mm::_base_/w8a8.py']")
    values = config.to_dict()
    try:
        named = dict(base=values.get('recipe'), preset=values.get('preset'))
        shipped = Recipe.shipped(**{k: name for k, name in named.items() if name is not None})
        return shipped.changed({section: values.get(section) for section in SECTIONS})
    except UserError as error:
        whose = f'config {config.filename}: ' if config.filename else ''
        raise UserError(f'{whose}{error}') from error
