# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Parts are found by name from other scopes, without any import of ours."""
import subprocess
import sys

import pytest


@pytest.mark.parametrize('scope, module', [('mmdet', 'mmdet'), ('mmseg', 'mmseg')])
def test_hook_is_found_from_another_scope(scope, module):
    """In a fresh process: no custom_imports, no import of psaq_mm."""
    pytest.importorskip(module)
    code = ('import sys\n'
            'from mmengine.registry import HOOKS, init_default_scope\n'
            f'init_default_scope({scope!r})\n'
            'assert "psaq_mm" not in sys.modules\n'
            'hook = HOOKS.build(dict(type="psaq_mm.QuantizedCheckpointHook"))\n'
            'print(type(hook).__module__)\n')
    process = subprocess.run([sys.executable, '-c', code], capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == 'psaq_mm.engine.hooks.quantized_checkpoint_hook'


def test_every_kind_of_part_is_registered():
    import importlib

    from psaq_mm import registry
    from psaq_mm.adapters.hosts import HOSTS
    for files in HOSTS.values():  # imported with the first model of the host
        for file in files:
            importlib.import_module(f'psaq_mm.adapters.{file}')
    expected = dict(
        HOOKS={'QuantizedCheckpointHook', 'ProgressHook', 'ReportHook', 'ContactSheetHook',
              'BitsHook',
               'BackendHook'},
        RUNNERS={'PSAQRunner'},
        OBSERVERS={'MinMaxObserver', 'MSEObserver', 'MAEObserver', 'PercentileObserver'},
        PRIORS={'PatchSimilarityPrior', 'TotalVariationPrior', 'BatchNormPrior'},
        QUANT_OPS={'QuantLinear', 'QuantConv2d', 'QuantConvTranspose2d', 'QuantWindowMSA',
                   'QuantMMSegWindowMSA', 'QuantTimmWindowAttention', 'QuantTimmAttention'},
        ADAPTERS={'MMDetSwinAdapter', 'MMSegSwinAdapter', 'TimmSwinAdapter', 'TimmViTAdapter'},
        MODELS={'TimmClassifier'}, DATASETS={'ImageFolder'}, METRICS={'TopKAccuracy'})
    for name, parts in expected.items():
        found = getattr(registry, name)
        found.import_from_location()
        assert parts <= set(found.module_dict), name


def test_parts_of_the_users_own(demo_config, tmp_path):
    """What docs/extending.md shows: one decorated class each, used by name."""
    import torch
    from torch import nn

    import psaq_mm
    from psaq_mm.ops import QuantOp, op_for, register_op
    from psaq_mm.prior import PriorTerm
    from psaq_mm.quantization import MinMaxObserver, QuantSpec
    from psaq_mm.registry import OBSERVERS, PRIORS, QUANT_OPS

    try:
        @OBSERVERS.register_module()
        class HalfObserver(MinMaxObserver):
            def range(self):
                lower, upper = super().range()
                return lower / 2, upper / 2

        spec = QuantSpec(symmetric=True, observer=dict(type='HalfObserver'))
        observer = spec.build_observer()
        observer.observe(torch.tensor([-4., 2.]))
        assert [float(v) for v in observer.range()] == [-2., 1.]

        @PRIORS.register_module()
        class BrightnessPrior(PriorTerm):
            def __call__(self, state):
                return self.weight * state.images.mean((1, 2, 3)).pow(2)

        from mmdet.models.backbones import SwinTransformer
        model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                                out_indices=(0, 1))
        images = psaq_mm.synthesize(model, psaq_mm.SynthesisSettings(
            num_images=1, image_size=56, steps=2, shifts=(0, ),
            priors=dict(b=dict(type='BrightnessPrior', weight=3.))))
        assert images.shape == (1, 3, 56, 56)

        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        @register_op(Scaled)
        class QuantScaled(QuantOp, Scaled):
            roles = dict(weight=0, input=-1)

            def forward(self, x):
                weight = self.quantized_weight()
                return 2 * nn.functional.linear(self.quantize('input', x), weight, self.bias)

        assert op_for(Scaled(2, 2)) is QuantScaled
    finally:
        for registry, name in ((OBSERVERS, 'HalfObserver'), (PRIORS, 'BrightnessPrior'),
                               (QUANT_OPS, 'QuantScaled')):
            registry.module_dict.pop(name, None)
