"""The report of a run: a self-contained HTML page and a short Markdown version.

Runs after the graph, whatever the gate's verdict. `report.html` is logged to MLflow; the flow links to
it and shows `report.md` in Prefect. The page contains training texts and model outputs: its templates
escape them, and its content security policy forbids scripts and requests.
"""
