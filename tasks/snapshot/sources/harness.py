"""Items of lm-eval tasks, saved as files so that no later stage accesses the Hub."""

import logging
from collections.abc import Iterator
from typing import Any

from nightshift.core.errors import DataError
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.hub import hub_errors

log = logging.getLogger(__name__)


def harness_items(name: str, manager: Any = None) -> Iterator[dict[str, Any]]:
    """Yield the zero-shot items of a task, or of each task in a group, in the task's own wording.

    Args:
        name: Name of a multiple-choice task or group of lm-eval.
        manager: lm-eval TaskManager; by default that of the built-in tasks.

    Yields:
        id, slice (the task), question, choices, answer (index).

    Raises:
        DataError: The task does not exist, is not multiple choice, or its data cannot be downloaded.
    """
    from lm_eval.tasks import TaskManager

    # lm-eval logs every item at INFO.
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        tasks = (manager or TaskManager()).load([name])["tasks"]
    except KeyError as err:
        raise DataError(f"snapshot.benchmarks: lm-eval has no task {name!r}; see `lm-eval ls tasks`") from err
    except hub_errors(RuntimeError, ValueError) as err:
        reason = f"{type(err).__name__}: {err}".partition("\n")[0]
        raise DataError(
            f"snapshot.benchmarks: lm-eval:{name}: its data cannot be downloaded ({reason}); allow access to "
            "the Hub (unset HF_HUB_OFFLINE), or use a folder with task.yaml and items.jsonl"
        ) from err
    for task_name, task in sorted(tasks.items()):
        kind = task.get_config("output_type")
        if kind != CHOICE_TASK["output_type"] or task.multiple_input:
            raise DataError(
                f"snapshot.benchmarks: lm-eval:{name}: {task_name} has output_type {kind}, but only "
                "multiple choice with a common question is supported; convert it to a benchmark folder"
            )
        for number, doc in enumerate(task.eval_docs):
            choices = [str(choice) for choice in task.doc_to_choice(doc)]
            answer = task.doc_to_target(doc)
            yield {
                "id": f"{task_name}/{number}",
                "slice": task_name,
                "question": str(task.doc_to_text(doc)),
                "choices": choices,
                "answer": answer if isinstance(answer, int) else choices.index(str(answer)),
            }
