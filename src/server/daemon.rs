//! Starts and ends the daemon: opens the image, binds the sockets and enters the sandbox in this order, and releases
//! everything again at the end.

use std::sync::Arc;
use std::time::Duration;

use super::files::DaemonFiles;
use super::front_ends::FrontEnds;
use super::hand_over::{HandOverRequests, NewDaemon};
use super::permissions;
use super::socket::{self, PreparedSocket};
use super::take_over::{self, TakeOver, TakenOver};
use super::wiring::{self, OpenDisk, OpenImage};
use super::{Control, Server, ServerError, new_notifier};
use crate::base::logging;
use crate::base::signals::Signals;
use crate::base::systemd;
use crate::config::Config;
use crate::sandbox::Sandbox;

/// How long a process that handed its disk over waits until systemd has read its messages. It has nothing else to do.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the end waits for other threads that use the image. Releasing an RBD image takes a few requests to the cluster.
const IMAGE_CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// A running daemon: its disk, its sockets and its files.
pub(super) struct Daemon {
    pub(super) server: Server,
    pub(super) front_ends: FrontEnds,
    control: Box<dyn Control>,
    pub(super) files: DaemonFiles,
    image: OpenImage,
}

impl Daemon {
    /// Opens and binds everything, enters the sandbox, and with `--take-over` takes the guest over from the old daemon.
    pub(super) fn start(config: &Config, signals: Signals) -> Result<Daemon, ServerError> {
        let sandbox = Sandbox::prepare(permissions::of(config)).map_err(ServerError::Sandbox)?;
        systemd::connect();
        // The service manager may have passed the socket to the old daemon only, which passes it on.
        let prepare = || socket::prepare(&config.listen).map_err(ServerError::Socket);
        let prepared = if config.take_over.is_none() { Some(prepare()?) } else { None };
        let copy_directories = sandbox.copy_directories();
        let open = || wiring::open(config, copy_directories).map_err(ServerError::Image);
        let disk = sandbox.open(open).map_err(ServerError::Sandbox)??;
        let take_over = config.take_over.as_deref().map(|path| TakeOver::begin(path, &*disk.served));
        let mut take_over = take_over.transpose().map_err(ServerError::TakeOver)?;
        let started = Self::bind(config, signals, sandbox, disk, prepared, take_over.as_mut());
        match take_over {
            None => started,
            Some(take_over) => match started {
                Ok(daemon) => daemon.take_over(config, take_over),
                Err(error) => {
                    // This reports the error to the old daemon. Main logs it here.
                    let _ = take_over.abort(&error.to_string());
                    Err(error)
                }
            },
        }
    }

    fn bind(
        config: &Config,
        signals: Signals,
        sandbox: Sandbox,
        disk: OpenDisk,
        prepared: Option<PreparedSocket>,
        take_over: Option<&mut TakeOver>,
    ) -> Result<Daemon, ServerError> {
        let files = DaemonFiles::create(config, prepared, take_over)?;
        let (quit, requests) = (new_notifier()?, HandOverRequests::new()?);
        let listener = files.control_listener()?;
        sandbox.enter().map_err(ServerError::Sandbox)?;
        logging::start_thread();
        let quit_notifier = Arc::clone(&quit);
        let control = (disk.start_control)(listener, Arc::new(move || quit_notifier.notify()), Arc::clone(&requests))
            .map_err(ServerError::ControlThread)?;
        let server = Server { served: disk.served, signals, quit, requests, end_signals: 0 };
        let front_ends = FrontEnds::new(Arc::clone(&server.served))?;
        Ok(Daemon { server, front_ends, control, files, image: disk.image })
    }

    /// Takes the guest over. Once the guest is ours, failures are logged and it is served regardless.
    fn take_over(self, config: &Config, take_over: TakeOver) -> Result<Daemon, ServerError> {
        let Daemon { server, mut front_ends, control, files, image } = self;
        let taken_over = take_over.finish(&*server.served, &mut front_ends);
        let TakenOver { figures, attendant_missing } = taken_over.map_err(|error| {
            // The front-end's thread releases the image, which the old daemon takes back.
            front_ends.join();
            ServerError::TakeOver(error)
        })?;
        let files = files.take_ownership(config);
        let listener = files.control_listener().unwrap_or_else(|error| {
            log::error!("{error}; the control socket gets no replies until the daemon is restarted");
            None
        });
        if let Err(error) = control.take_over(listener, figures.clone(), attendant_missing) {
            log::error!("cannot serve the control socket: {error}; it gets no replies until the daemon is restarted");
        }
        log::info!(
            "took the guest over from pid {}: it was paused for {} us, {} us of it until its requests were completed",
            figures.from_pid,
            figures.pause_us,
            figures.drained_us.unwrap_or(0)
        );
        take_over::print_figures(&figures);
        Ok(Daemon { server, front_ends, control, files, image })
    }

    /// Ends this process after a hand-over: it touches neither the disk nor the files that the new daemon took over.
    pub(super) fn end_after_hand_over(self, new: NewDaemon) {
        let Daemon { server, mut front_ends, control, files, image } = self;
        log::info!("another process (pid {}) serves the disk: ending", new.pid);
        if new.pid != 0 {
            systemd::systemd(&format!("MAINPID={}", new.pid));
        }
        files.hand_over(new.files);
        drop(control);
        front_ends.join();
        // If systemd misses the new MAINPID, it takes the end of this process for the end of the service.
        systemd::finish(NOTIFY_TIMEOUT);
        drop((front_ends, server));
        image.close(IMAGE_CLOSE_TIMEOUT);
    }

    /// Drains, syncs and ends. `served`: the result of serving.
    pub(super) fn end(self, served: Result<(), ServerError>) -> Result<(), ServerError> {
        let Daemon { mut server, mut front_ends, control, files, image } = self;
        if matches!(served, Err(ServerError::Interrupted(_))) {
            std::mem::forget(control);
            return served;
        }
        // From here on a front-end that connects is refused at once.
        let _files = files.stop_listening();
        // Not retried if systemd's socket is full: no thread polls it while the disk drains. systemd needs it only to show
        // the service as stopping and to count TimeoutStopSec= where it did not ask for the stop itself. It learns of the
        // end by the end of this process (sd_notify(3)), and waiting for the socket would delay that.
        systemd::systemd_if_room("STOPPING=1");
        let ended = server.end();
        match ended {
            // The control thread may wait for the disk, so dropping could block.
            Err(ServerError::Interrupted(_)) => std::mem::forget(control),
            // The control thread ends before the socket's path is removed.
            _ => drop(control),
        }
        if let (Err(error), Err(_)) = (&served, &ended) {
            log::error!("{error}");
        }
        ended?;
        // Everything is synced. The remaining steps may hang for ever (librbd closes an image whose cluster is gone); a
        // second signal then kills the process.
        if let Err(error) = server.signals.release() {
            log::warn!("a second signal will not end the process: {error}; use SIGKILL if it hangs");
        }
        served?;
        front_ends.join();
        drop((front_ends, server));
        image.close(IMAGE_CLOSE_TIMEOUT);
        Ok(())
    }
}
