# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Draw the figures of docs/concepts.md: of the demo detector, and of a scene that it never saw.

    python docs/figures.py          # writes docs/images/{block,similarity,ranges,gptq}.svg
"""
import sys
from pathlib import Path
from typing import Any, Dict, List

import matplotlib
import numpy as np
import torch
from torch import Tensor

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.prior.density import binned_density, entropy
from psaq_mm.prior.patch_similarity import cosine_similarity_matrix
from psaq_mm.quantization import QuantSpec
from psaq_mm.quantization.fake_quantize import fake_quantize
from psaq_mm.quantization.gptq import gptq_round, second_moments
from psaq_mm.quantization.ranges import scale_and_zero_point
from psaq_mm.registry import OBSERVERS

matplotlib.use('svg')
matplotlib.rcParams.update({
    'svg.hashsalt': 'psaq_mm', 'svg.fonttype': 'none', 'font.size': 9})
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / 'docs' / 'images'
DEMO = ROOT / 'demo'
FLOAT, INT8 = '#e8eef7', '#f6c28b'
sys.path.insert(0, str(DEMO))


def save(name: str) -> None:
    """The same bytes for the same drawing."""
    pyplot.savefig(IMAGES / f'{name}.svg', bbox_inches='tight', metadata=dict(Date=None))
    pyplot.close()


def block() -> None:
    """Where quantizers stand in a Swin block, placement ``operands``."""
    rows = [[('LayerNorm', FLOAT), ('qkv\nLinear', INT8), ('Q x K', INT8), ('softmax', FLOAT),
             ('attention\nx V', INT8), ('proj\nLinear', INT8), ('+', FLOAT)],
            [('LayerNorm', FLOAT), ('FFN 1\nLinear', INT8), ('GELU', FLOAT),
             ('FFN 2\nLinear', INT8), ('+', FLOAT)]]
    _, axes = pyplot.subplots(figsize=(9.5, 3))
    for y, row in zip((1, 0), rows):
        for x, (label, color) in enumerate(row):
            axes.text(1.6 * x, y, label, ha='center', va='center', bbox=dict(
                boxstyle='round,pad=0.45', facecolor=color, edgecolor='black'))
            if x:
                axes.annotate('', (1.6 * x - .55, y), (1.6 * x - 1.05, y),
                              arrowprops=dict(arrowstyle='->'))
            if color == INT8:
                axes.plot([1.6 * x - .8], [y + .22], 'v', color='firebrick', markersize=9)
    axes.text(0, -.5, '\u25bc a quantizer of an activation. What is orange multiplies integers in '
              'an engine;\n   weights of Linear layers are integers too.', va='top')
    axes.set(xlim=(-.7, 10.1), ylim=(-.95, 1.5))
    axes.axis('off')
    save('block')


def similarity(model: Any, scene: np.ndarray, images: Dict[str, Tensor]) -> None:
    """Similarities of one patch of a scene, and the density of all of them for three images."""
    adapter = find_adapter(model)
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(9, 2.9), gridspec_kw=dict(width_ratios=[1, 1, 1.6]))
    for name, image in images.items():
        with torch.no_grad(), adapter.record_attention(model) as recorder:
            adapter.forward_backbone(model, image)
        output = recorder.pop_all()[0].output.mean(2)     # (windows, tokens, head_dim)
        alike = cosine_similarity_matrix(output)
        density = binned_density(alike.reshape(1, len(alike), -1))
        value = float(entropy(density, 2 / 255))
        right.plot(np.linspace(-1, 1, 256), density[0], label=f'{name}: entropy {value:.2f}')
        if name == 'demo scene':
            shown = alike
    side = int(len(shown)**.5)
    window = int(shown.flatten(1).std(1).argmax())
    size = scene.shape[0] // side
    top, start = divmod(window, side)
    left.imshow(scene[top * size:(top + 1) * size, start * size:(start + 1) * size, ::-1])
    left.set_title('a window of a scene: 7 x 7 patches', fontsize=9)
    middle.imshow(shown[window].numpy(), vmin=-1, vmax=1, cmap='RdBu')
    middle.set_title('similarity of every two of them', fontsize=9)
    for axes in (left, middle):
        axes.set(xticks=[], yticks=[])
    right.set(xlabel='cosine similarity', ylabel='density', yscale='log', ylim=(1e-3, None))
    right.legend(fontsize=8)
    figure.tight_layout()
    save('similarity')


def inputs_of(model: Any, name: str, image: Tensor) -> Tensor:
    """What a layer is given, shape (rows, channels)."""
    seen: List[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(args[0].detach()))
    with torch.no_grad():
        find_adapter(model).forward_backbone(model, image)
    handle.remove()
    return seen[0].flatten(0, -2)


def ranges(inputs: Tensor) -> None:
    """Where range rules put the ends, and what the integers of 4 bits then are."""
    _, axes = pyplot.subplots(figsize=(9, 2.8))
    axes.hist(inputs.flatten().numpy(), 150, color='lightgray', histtype='stepfilled')
    axes.set(yscale='log', xlabel='input of the second FFN layer of a block, after GELU',
             ylabel='values')
    rules = {'min-max': dict(type='MinMaxObserver'),
             'middle 99.9 %': dict(type='PercentileObserver', percentile=0.999),
             'least squared error': dict(type='MSEObserver', min_factor=0.02, candidates=100)}
    height = axes.get_ylim()[1]
    for place, (name, rule) in enumerate(rules.items()):
        spec = QuantSpec(bits=4, symmetric=False, observer=rule)
        arguments = {k: v for k, v in rule.items() if k != 'type'}
        observer = OBSERVERS.get(rule['type'])(spec, **arguments)
        observer.observe(inputs)
        scale, zero = scale_and_zero_point(*observer.range(), spec)
        low, high = spec.integer_range
        grid = (np.arange(low, high + 1) - float(zero)) * float(scale)
        rounded = fake_quantize(inputs, scale, zero, spec.integer_range)
        ratio = 10 * torch.log10(inputs.square().sum() / (inputs - rounded).square().sum())
        axes.plot(grid, [height / 10**(.6 * place + .3)] * len(grid), '|-', color=f'C{place}',
                  label=f'{name}: 16 integers, {float(ratio):.1f} dB', markersize=9)
    axes.legend(fontsize=8)
    save('ranges')


def gptq(layer: Any, inputs: Tensor, others: Tensor) -> None:
    """Error of the weights and of what they give, to nearest and by GPTQ, in 2 to 8 bits."""
    weight, errors = layer.weight.detach(), {}
    for bits in range(2, 9):
        spec = QuantSpec(bits=bits, granularity='per_channel')
        ends = weight.amin(1), weight.amax(1)
        scale, zero = scale_and_zero_point(*ends, spec)
        nearest = fake_quantize(weight, scale, zero, spec.integer_range, 0)
        rounded = gptq_round(weight, second_moments(inputs), scale, zero, spec.integer_range)
        for name, found in (('to nearest', nearest), ('by GPTQ', rounded)):
            for what, x in (('of weights', torch.eye(weight.shape[1])), ('of outputs', others)):
                signal, noise = x @ weight.T, x @ (weight - found).T
                ratio = 10 * torch.log10(signal.square().sum() / noise.square().sum())
                errors.setdefault((what, name), []).append(float(ratio))
    _, panels = pyplot.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for axes, what in zip(panels, ('of weights', 'of outputs')):
        for name in ('to nearest', 'by GPTQ'):
            axes.plot(range(2, 9), errors[what, name], 'o-', label=name, markersize=4)
        axes.set(title=f'SQNR {what}', xlabel='bits')
        axes.legend(fontsize=8)
    panels[0].set_ylabel('dB')
    save('gptq')


def main() -> None:
    from scenes import render
    model: Any = psaq_mm.init_model(str(DEMO / 'mask_rcnn_swin_demo.py'),
                                    str(DEMO / 'mask_rcnn_swin_demo.pth'), device='cpu')
    preprocess = model.data_preprocessor

    def seen(seed: int) -> Tensor:
        pixels = torch.from_numpy(render(seed)[0].transpose(2, 0, 1).copy()).float()[None]
        if preprocess._channel_conversion:
            pixels = pixels[:, [2, 1, 0]]
        return (pixels - preprocess.mean) / preprocess.std

    scene, other = seen(100000), seen(100001)
    noise = torch.randn(scene.shape, generator=torch.Generator().manual_seed(0))
    made = psaq_mm.synthesize(model, psaq_mm.SynthesisSettings(num_images=1), seed=0)
    block()
    similarity(model, render(100000)[0], {
        'Gaussian noise': noise, 'made by the prior': made, 'demo scene': scene})
    ranges(inputs_of(model, 'backbone.stages.1.blocks.0.ffn.layers.1', scene))
    name = 'backbone.stages.2.blocks.0.attn.w_msa.qkv'
    gptq(model.get_submodule(name), inputs_of(model, name, made), inputs_of(model, name, other))


if __name__ == '__main__':
    main()
