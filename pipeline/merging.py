"""Runs one merge of the pipeline, with progress and a record."""

from ..store.workspace import Workspace
from .products.merged import Merged
from .products.product import OpenSite
from .progress import Progress


def merge(product: Merged, *, site: OpenSite, workspace: Workspace, progress: Progress) -> None:
    """Merge, and record a run in the workspace. The model appears in one step.

    Raises:
        FuselineError: the models cannot be merged.
    """
    from ..train.merging.merge import merge as merge_models  # loads torch

    models = product.models(site)
    with (
        workspace.run("merge", name=product.name, parameters=product.config.model_dump()) as run,
        progress.writing(product.title) as follow,
    ):
        report = merge_models(
            product.config,
            base=product.base(site).folder,
            models={name: model.folder for name, model in models.items()},
            output=product.export_folder(workspace),
            identity=dict(site.identity(product)),
            lineage=product.lineage(site),
            tokenizer_of=next(iter(models.values())).folder,  # includes the chat template of their training
            on_progress=follow,
        )
        run.metrics.update(models=len(models), tensors=len(report.tensors), stored_bytes=report.n_bytes)
    for warning in report.warnings:
        progress.say(f"{product.title}: {warning}")
