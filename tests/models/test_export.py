"""Exported encoder and decoder give what eager PyTorch gives, for batches not seen at export."""

import pytest
import torch

from muse.models.export import export_onnx, export_part
from tests.helpers import MIXED_DECODER, random_images, tiny_model

SIZE = (48, 64)
BATCHES = (1, 3)


def expected(model, images):
    with torch.no_grad():
        latent = model.encode(images).latent
        return latent, model.decode(latent)


def grid_decoder(**changes):
    return tiny_model(decoder={"source": "random", "config": {**MIXED_DECODER, **changes}})


@pytest.mark.parametrize("model", [tiny_model, grid_decoder], ids=["resnet", "attention"])
def test_programs_equal_eager(model):
    model = model()
    encoder, decoder = (export_part(model, part, SIZE).module() for part in ("encoder", "decoder"))
    for batch in BATCHES:
        images = random_images(batch, *SIZE)
        latent, pixels = expected(model, images)
        torch.testing.assert_close(encoder(images), latent, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(decoder(latent), pixels, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [tiny_model, grid_decoder], ids=["resnet", "attention"])
def test_onnx_files_equal_eager(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported files")
    pytest.importorskip("onnxscript", reason="torch.onnx needs it to export")
    model = model()
    export_onnx(model, tmp_path / "onnx", SIZE)
    providers = ["CPUExecutionProvider"]
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / f"onnx/{part}.onnx", providers=providers)
        for part in ("encoder", "decoder")
    )
    for batch in BATCHES:
        images = random_images(batch, *SIZE)
        latent, pixels = expected(model, images)
        (made,) = encoder.run(["latent"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), latent, atol=1e-4, rtol=1e-3)
        (made,) = decoder.run(["pixels"], {"latent": latent.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), pixels, atol=1e-4, rtol=1e-3)


def test_sizes_that_cannot_be_exported_are_named():
    with pytest.raises(ValueError, match="multiples of 16, got 50x64"):
        export_part(tiny_model(), "encoder", (50, 64))
    with pytest.raises(ValueError, match="encoder or decoder, got 'both'"):
        export_part(tiny_model(), "both")
