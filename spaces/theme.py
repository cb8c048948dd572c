"""Style and theme of the page."""

from __future__ import annotations

import gradio as gr

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.dark { --color-accent: var(--primary-400); }
.took { min-height: 1.6em; }
td, th { white-space: nowrap; }
.took p { font-variant-numeric: tabular-nums; }
#headline h1 { margin-bottom: 0.2em; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5em !important; }
  td, th { padding: 0.4em !important; font-size: 0.9em; }
  .rates [aria-label^="X-axis"] .role-axis-label text:not(:nth-child(5n)) { display: none; }
}
.many [aria-label^="X-axis"] .role-axis-label text:not(:nth-child(5n)) { display: none; }
"""


def theme() -> gr.themes.Base:
    """Return the theme: colours with enough contrast for text, light and dark, and fonts that every machine has."""
    return gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        color_accent="*primary_700",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
