// Players whose videos play together. One set of listeners on the document: Gradio puts players in and takes them out.
(() => {
  const player = (element) => element.closest?.(".tav-player");
  const videos = (figure) => [...figure.querySelectorAll("video")];

  function together(figure) {
    const [first, ...others] = videos(figure);
    for (const other of others) {
      if (Math.abs(other.currentTime - first.currentTime) > 0.05) other.currentTime = first.currentTime;
      if (first.paused !== other.paused) first.paused ? other.pause() : other.play().catch(() => {});
    }
    const seek = figure.querySelector(".tav-seek");
    if (first.duration && document.activeElement !== seek) seek.value = (1000 * first.currentTime) / first.duration;
    const play = figure.querySelector(".tav-play");
    play.textContent = first.paused ? "▶" : "❚❚";
    play.setAttribute("aria-label", first.paused ? "Play" : "Pause");
  }

  for (const name of ["timeupdate", "play", "pause", "seeked", "loadeddata"]) {
    document.addEventListener(name, (event) => {
      const figure = player(event.target);
      if (!figure || event.target !== videos(figure)[0]) return;
      if (name === "loadeddata" && matchMedia("(prefers-reduced-motion: reduce)").matches) videos(figure).forEach((one) => one.pause());
      together(figure);
    }, true);
  }

  document.addEventListener("input", (event) => {
    const figure = player(event.target);
    if (!figure) return;
    if (event.target.matches(".tav-wipe")) figure.style.setProperty("--wipe", `${event.target.value}%`);
    if (event.target.matches(".tav-seek")) {
      for (const one of videos(figure)) if (one.duration) one.currentTime = (event.target.value / 1000) * one.duration;
    }
  });

  document.addEventListener("click", (event) => {
    const figure = player(event.target);
    if (!figure) return;
    if (event.target.matches(".tav-play")) {
      const paused = videos(figure)[0].paused;
      for (const one of videos(figure)) paused ? one.play().catch(() => {}) : one.pause();
    }
    if (event.target.matches(".tav-toggle")) {
      const wiping = figure.classList.toggle("tav-wiping");
      event.target.setAttribute("aria-pressed", String(wiping));
      event.target.textContent = wiping ? "Side by side" : "Wipe";
    }
  });
})();
