"""What a reconstruction imports: nothing that it does not use."""

import json
import subprocess
import sys

from tests.helpers import ROOT

CODE = """
import json, sys
import muse
found = [sorted({name.partition(".")[0] for name in sys.modules})]
import muse.inference, muse.models.loading
found.append(sorted({name.partition(".")[0] for name in sys.modules}))
import torch
with torch.inference_mode():
    muse.MUSE_ViT.from_pretrained("muse_tiny").reconstruct(torch.rand(1, 3, 16, 16))
found.append(sorted({name.partition(".")[0] for name in sys.modules}))
print(json.dumps(found))
"""
NEVER = {"diffusers", "torchmetrics", "webdataset", "open_clip", "timm", "matplotlib", "sklearn"}


def test_a_reconstruction_imports_no_package_that_it_does_not_use():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    alone, inference, picture = (set(names) for names in json.loads(done.stdout))
    assert not alone & {"torch", "numpy", "omegaconf", "yaml", *NEVER}
    assert "torch" in inference
    # InternViT is transformers' class, which is imported when a model is built. Where they are
    # installed it brings in scipy, accelerate and (transformers 5.20) scikit-learn.
    assert not inference & {"transformers", "scipy", "accelerate", *NEVER}
    assert not picture & (NEVER - {"sklearn"})
