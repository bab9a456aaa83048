"""A batch's route as device tensors with fixed addresses, for `masquerade.kernels.cuda`, tested as it is."""

from masquerade.model.cuda.merged import MergedLinears, merge_linears
from masquerade.model.cuda.slots import SlotMap, SlotRoute, Slots, SlotShape, find_entries
from masquerade.model.cuda.staging import Staging

__all__ = ["MergedLinears", "SlotMap", "SlotRoute", "SlotShape", "Slots", "Staging", "find_entries", "merge_linears"]
