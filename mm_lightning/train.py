"""The command ``python -m mm_lightning.train``, and what it is made of."""

from mm_lightning.command.configuration import CONF
from mm_lightning.command.scripts import train as main
from mm_lightning.command.train import build_trainer, quieten, run

__all__ = ["CONF", "build_trainer", "main", "quieten", "run"]

if __name__ == "__main__":
    main()
