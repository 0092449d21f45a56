# As PSAQ-ViT V1's released code places quantizers and makes images, with V2's
# change (no labels). What V2 itself does beyond that is not public.
_base_ = './data_free.py'
quantization = dict(placement='v1', patch_embed_bits=None)
synthesis = dict(
    num_images=32,
    batch_size=32,
    steps=500,
    priors=dict(patch_similarity=dict(form='v1', points=10)))
