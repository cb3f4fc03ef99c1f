"""Tasks that lm-eval knows by name: their items become files, so that no later stage asks a hub."""

import logging
from collections.abc import Iterator
from typing import Any

from nightshift.core.errors import DataError
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.hub import hub_errors

log = logging.getLogger(__name__)


def harness_items(name: str, manager: Any = None) -> Iterator[dict[str, Any]]:
    """Yield the items of a task, or of each task of a group, with the task's own wording and no examples.

    Args:
        name: Of a multiple-choice task or group of lm-eval.
        manager: lm-eval's TaskManager; by default that of the tasks that come with it.

    Yields:
        id, slice (the task), question, choices, answer (index).

    Raises:
        DataError: There is no such task, it is not multiple choice, or its data cannot be fetched.
    """
    from lm_eval.tasks import TaskManager

    # The harness logs at INFO what it does for each item.
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        tasks = (manager or TaskManager()).load([name])["tasks"]
    except KeyError as err:
        raise DataError(f"snapshot.benchmarks: lm-eval has no task {name!r}; see `lm-eval ls tasks`") from err
    except hub_errors(RuntimeError, ValueError) as err:
        reason = f"{type(err).__name__}: {err}".partition("\n")[0]
        raise DataError(
            f"snapshot.benchmarks: lm-eval:{name}: its data cannot be fetched ({reason}); reach the hub "
            "(with HF_HUB_OFFLINE unset), or name a folder with task.yaml and items.jsonl"
        ) from err
    for task_name, task in sorted(tasks.items()):
        kind = task.get_config("output_type")
        if kind != CHOICE_TASK["output_type"] or task.multiple_input:
            raise DataError(
                f"snapshot.benchmarks: lm-eval:{name}: {task_name} is of the type {kind}, and only "
                "multiple choice with a common question is read; write it down as a benchmark of its own"
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
