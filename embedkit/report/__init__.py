"""Results as pages that open offline. Torch-free."""

from embedkit.report.contact_sheet import Picture, SheetRow, contact_sheet

__all__ = ["Picture", "SheetRow", "contact_sheet"]
