"""Pages about plans and runs, for people: `plan.html`."""
