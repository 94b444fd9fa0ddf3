// "play both" starts the two videos of a pair together from their beginning, or stops them.
for (const button of document.querySelectorAll("button.play")) {
  const videos = [...button.closest(".pair").querySelectorAll("video")];
  const show = () => { button.textContent = videos.every((v) => v.paused) ? "play both" : "stop both"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    const start = videos.every((v) => v.paused);
    for (const video of videos) {
      if (start) { video.currentTime = 0; video.play(); } else { video.pause(); }
    }
  });
  for (const video of videos) { video.addEventListener("play", show); video.addEventListener("pause", show); }
}
