"""Results as pages that open offline. Torch-free."""

from embedkit.report.check_report import check_page
from embedkit.report.contact_picture import contact_picture, contact_strip
from embedkit.report.contact_sheet import Picture, SheetRow, contact_sheet
from embedkit.report.run_files import keep_embeddings
from embedkit.report.run_report import write_run_report

__all__ = [
    "Picture",
    "SheetRow",
    "check_page",
    "contact_picture",
    "contact_sheet",
    "contact_strip",
    "keep_embeddings",
    "write_run_report",
]
