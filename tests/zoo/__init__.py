"""LightningModules as people write them, none of which knows of mixup. The list of all is ``ENTRIES``."""

from zoo import by_hand, generative, images, metric, regression, schemes, segmentation, sequences, tabular, text
from zoo.entry import Entry

__all__ = ["ENTRIES", "Entry"]

_DOMAINS = (images, text, sequences, segmentation, tabular, regression, by_hand, metric, schemes, generative)
ENTRIES: list[Entry] = [entry for domain in _DOMAINS for entry in domain.ENTRIES]
