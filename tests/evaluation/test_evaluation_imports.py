import subprocess
import sys


def test_evaluation_imports_neither_lightning_nor_hydra_nor_matplotlib() -> None:
    code = "import sys, mm_lightning.evaluation; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    assert "torch" in packages
    unwanted = {"lightning", "lightning_utilities", "pytorch_lightning", "torchmetrics", "hydra", "matplotlib"}
    assert packages & unwanted == set()
