# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A report of a made-up run."""
import copy
import json


def small_report(**changes):
    """A report of four modules; values of ``changes`` take the place of its own."""
    def tensor(bits, upper):
        return dict(bits=bits, symmetric=True, granularity='per_tensor', ranges=1, lower=-upper,
                    upper=upper)

    modules = [dict(name=name, op=op, sqnr_db=30. - i, sensitivity=0.01 * (i + 1),
                    tensors={**({} if 'MSA' in op else dict(weight=tensor(4, 0.5))),
                             **{role: tensor(8, 2. + i) for role in roles}})
               for i, (name, op, roles) in enumerate([
                   ('backbone.patch_embed.projection', 'QuantConv2d', ['input']),
                   ('backbone.stages.0.blocks.0.attn.w_msa', 'QuantWindowMSA', ['query', 'key']),
                   ('backbone.stages.0.blocks.0.ffn.layers.1', 'QuantLinear', ['input']),
                   ('backbone.stages.1.blocks.0.attn.w_msa.qkv', 'QuantLinear', ['input'])])]
    report = dict(
        modules=modules, losses=dict(patch_similarity=[3., 2., 1.], total=[4., 3., 2.]),
        seconds=dict(synthesis=61.5, calibration=2., report=1.), size=dict(
            float_bytes=8_000_000, stored_bytes=1_000_000),
        memory=dict(synthesis=dict(process=900_000_000)), images=dict(
            count=2, shape=[3, 8, 8], own=0, synthetic=2),
        file_bytes=dict(float=9_000_000, quantized=2_000_000), images_of_sensitivity=1, seed=3,
        config='configs/my_model_w4a8.py', command='python tools/quantize.py my.py my.pth',
        settings=dict(synthesis=dict(steps=3, lr=0.2), quantization=dict(scope='backbone')),
        checkpoint=dict(file='my.pth', sha256='ab' * 32), device='cpu',
        versions=dict(python='3.11', psaq_mm='0.2.0'))
    return copy.deepcopy({**report, **changes})


def without(report, *keys):
    """The report of an older version, which has not measured so much."""
    modules = [{k: v for k, v in entry.items() if k not in keys} for entry in report['modules']]
    return {k: v for k, v in dict(report, modules=modules).items() if k not in keys}


def write_run(folder, report):
    """The work directory of a run."""
    folder.mkdir()
    (folder / 'report.json').write_text(json.dumps(report))
    return folder
