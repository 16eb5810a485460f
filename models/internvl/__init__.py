"""InternVL: one definition, four configurations, made from the families beside this folder."""
