"""RedKnotLM: lm-evaluation-harness on a RedKnotCache, so that its tasks run unchanged.

    lm_eval.simple_evaluate(model=RedKnotLM("HuggingFaceTB/SmolLM2-135M-Instruct"), tasks=["..."])
    python -m redknot_hf.eval.harness run --model redknot --model_args pretrained=DIR,profile=P --tasks ...

The second form is the harness's own command line with the model "redknot" registered. Needs the extra `lm-eval`.

Every forward, generation and likelihoods alike, goes through a fresh cache with windows while prefilling: each position
sees what it would see if the text had been fed token by token, so a likelihood over a whole text is that of reading the
text with this cache. The harness hands over context and question in one piece; a cache that prefills with full attention
would see the question before it evicts, so that mode is not offered here (`redknot eval --prefill full` has it).
"""

from __future__ import annotations

from typing import Any

from ..cache import RedKnotCache
from ..errors import MissingExtraError, RedKnotError
from ..heads import HeadProfile

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtraError("RedKnotLM", "lm_eval", "lm-eval") from error

import torch

__all__ = ["RedKnotLM", "main"]


@register_model("redknot")
class RedKnotLM(HFLM):
    """A Hugging Face causal model of the harness whose every forward runs with a `RedKnotCache`.

    Args:
        pretrained: Hub id or folder, or a loaded model (switched to attn_implementation "redknot").
        profile: a `HeadProfile`, or the file, shipped name or Hub id of one; None: the one shipped for the model, else
            all heads global.
        page_size: tokens per page.
        **options: what the harness's own `HFLM` takes: batch_size, dtype, device, max_length, ...

    Raises:
        RedKnotError: the profile does not fit the model, or the model is no decoder.
    """

    def __init__(self, pretrained: Any, profile: Any = None, page_size: int = 64, **options: Any) -> None:
        import redknot_hf  # noqa: F401  # registers "redknot"

        if isinstance(pretrained, str):
            options["attn_implementation"] = "redknot"
        super().__init__(pretrained=pretrained, **options)
        if self.backend != "causal":
            raise RedKnotError(f"pretrained={pretrained!r}: expected a causal decoder, this is {self.backend}")
        self.model.set_attn_implementation("redknot")
        self.page_size = int(page_size)
        if profile is not None and not isinstance(profile, HeadProfile):
            profile = HeadProfile.load(profile)
        # made once so that a wrong profile is refused now, and a shipped one is found once
        self.profile = RedKnotCache(self.model.config, profile, page_size=self.page_size).profile

    def make_cache(self) -> RedKnotCache:
        """An empty cache for one forward or one generation."""
        profile = self.profile if self.profile is not None else HeadProfile.all_global(self.model.config)
        return RedKnotCache(self.model.config, profile, page_size=self.page_size)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]``; rows are padded on the right, which no earlier position sees."""
        from .generate import cache_argument

        with torch.no_grad():
            return self.model(inps, use_cache=True, **{cache_argument(self.model): self.make_cache()}).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, past_key_values=self.make_cache(), **options)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results, with the cache's settings."""
        cache = "all global" if self.profile is None else repr(self.profile)
        return {**super().get_model_info(), "redknot_profile": cache, "redknot_page_size": self.page_size}


def main() -> None:
    """The harness's command line, with the model "redknot"."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
