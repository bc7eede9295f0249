"""The report of a run: ``data`` reads the folder, ``findings`` and ``alarms`` say what is in it, ``page`` writes it.

Settings stand apart in ``trainer.report_settings``, so that reading a command line imports no plotting.
"""

from trainer.report.page import ReportFiles, main, write_report

__all__ = ["ReportFiles", "main", "write_report"]
