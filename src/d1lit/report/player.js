// The player: the page holds the finished completions; a step takes back what was not there yet.
for (const root of document.querySelectorAll("section.player")) {
  const steps = Number(root.dataset.steps), scrub = root.querySelector(".scrub"), play = root.querySelector(".play"), at = root.querySelector(".at");
  const tokens = [...root.querySelectorAll(".pane .t")].map((element) => ({
    element, text: element.textContent,
    events: (element.dataset.s || "").split(",").filter(Boolean).map(Number), // n: appeared or changed at step n; -n: masked again at step n
    was: element.dataset.was ? element.dataset.was.split("\u241f") : null,
  }));
  let timer = null;
  const changed = (events, place) => place > 0 && events[place] > 0 && events[place - 1] > 0; // another token stood there
  const show = (step) => {
    for (const { element, text, events, was } of tokens) {
      let last = -1;
      events.forEach((event, place) => { if (Math.abs(event) <= step) last = place; });
      const masked = events.length ? last < 0 || events[last] < 0 : step < steps;
      element.classList.toggle("masked", masked);
      element.classList.toggle("again", masked && last >= 0);
      const now = !masked && last >= 0 && events[last] === step && step < steps;
      element.classList.toggle("new", now && !changed(events, last));
      element.classList.toggle("edited", now && changed(events, last));
      if (was) element.textContent = masked || last < 0 ? text : was[last] || text;
    }
    scrub.value = step;
    at.textContent = `step ${step} of ${steps}`;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ Play"; };
  const start = () => {
    if (Number(scrub.value) >= steps) show(0);
    play.textContent = "❚❚ Pause";
    timer = setInterval(() => { if (Number(scrub.value) >= steps) stop(); else show(Number(scrub.value) + 1); }, Math.max(60, Math.min(400, 8000 / steps)));
  };
  play.addEventListener("click", () => (timer ? stop() : start()));
  scrub.addEventListener("input", () => { stop(); show(Number(scrub.value)); });
  root.querySelector(".back").addEventListener("click", () => { stop(); show(Math.max(0, Number(scrub.value) - 1)); });
  root.querySelector(".next").addEventListener("click", () => { stop(); show(Math.min(steps, Number(scrub.value) + 1)); });
  const said = ({ element, events, was }) => {
    const words = events.map((event, place) => {
      if (event < 0) return `masked again at step ${-event}`;
      return changed(events, place) ? `changed at step ${event}, from ${was ? was[place - 1] : "the same"}` : `fixed at step ${event}`;
    });
    return (words.join(", ") || "never reached") + (element.dataset.p ? `, confidence ${element.dataset.p}` : "");
  };
  for (const token of tokens) token.element.addEventListener("pointerenter", () => { token.element.title = said(token); }, { once: true });
  for (const pane of root.querySelectorAll(".pane")) { // by keyboard: the arrow keys go from token to token
    const own = tokens.filter(({ element }) => pane.contains(element)), readout = pane.querySelector(".readout"), blank = readout.textContent;
    let here = -1;
    const go = (place) => {
      if (own[here]) own[here].element.classList.remove("here");
      here = place;
      if (own[here]) own[here].element.classList.add("here");
      readout.textContent = own[here] ? `token ${here + 1}, ${own[here].element.classList.contains("masked") ? "masked now" : own[here].element.textContent}: ${said(own[here])}` : blank;
    };
    pane.addEventListener("keydown", (event) => {
      const last = own.length - 1, next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") go(-1);
      if (next === undefined) return;
      event.preventDefault();
      go(Math.min(last, Math.max(0, next)));
    });
    pane.addEventListener("blur", () => go(-1));
  }
  addEventListener("beforeprint", () => { stop(); show(steps); });
}
