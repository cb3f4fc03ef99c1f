"""The report of a run: one HTML page that needs nothing but itself, and its short form in Markdown.

Runs after the graph, whatever the gate said. `report.html` is logged to MLflow; the flow links to it, and
shows `report.md` in Prefect. The page holds texts of the training data and of models: its templates escape
them, and its policy forbids scripts and requests to the browser.
"""
