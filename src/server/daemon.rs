//! The daemon from its first step to its last: what is opened and bound in which order, and what becomes of it.

use std::sync::Arc;
use std::time::Duration;

use super::files::Files;
use super::front_ends::FrontEnds;
use super::hand_over::{NewDaemon, Requests};
use super::permissions;
use super::socket::{self, Prepared};
use super::take_over::{self, TakeOver};
use super::wiring::{self, Opened};
use super::{Control, Server, ServerError, new_bell};
use crate::base::logging;
use crate::base::signals::Signals;
use crate::base::systemd;
use crate::config::Config;
use crate::sandbox::Sandbox;

/// How long a process that handed its disk over waits for systemd to take what it was told; it has nothing else to do.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(60);

/// Everything that is open, and serves.
pub(super) struct Daemon {
    pub(super) server: Server,
    pub(super) front_ends: FrontEnds,
    control: Box<dyn Control>,
    pub(super) files: Files,
}

impl Daemon {
    /// Opens and binds everything, enters the sandbox, and takes the guest over if there is one to be taken over.
    pub(super) fn start(config: &Config, signals: Signals) -> Result<Daemon, ServerError> {
        let sandbox = Sandbox::prepare(permissions::of(config)).map_err(ServerError::Sandbox)?;
        systemd::connect();
        // A socket that was given to the daemon before us need not be given to us.
        let prepare = || socket::prepare(&config.listen).map_err(ServerError::Socket);
        let prepared = if config.take_over.is_none() { Some(prepare()?) } else { None };
        let copy_directories = sandbox.copy_directories();
        let open = || wiring::open(config, copy_directories).map_err(ServerError::Image);
        let disk = sandbox.open(open).map_err(ServerError::Sandbox)??;
        let taking = config.take_over.as_deref().map(|path| TakeOver::begin(path, &*disk.served));
        let mut taking = taking.transpose().map_err(ServerError::TakeOver)?;
        let started = Self::bind(config, signals, sandbox, disk, prepared, taking.as_mut());
        match taking {
            None => started,
            Some(taking) => match started {
                Ok(daemon) => daemon.take_over(config, taking),
                Err(error) => {
                    // The other one hears it; ours is main's to log.
                    let _ = taking.give_up(&error.to_string());
                    Err(error)
                }
            },
        }
    }

    fn bind(
        config: &Config,
        signals: Signals,
        sandbox: Sandbox,
        disk: Opened,
        prepared: Option<Prepared>,
        taking: Option<&mut TakeOver>,
    ) -> Result<Daemon, ServerError> {
        let files = Files::make(config, prepared, taking)?;
        let (quit, requests) = (new_bell()?, Requests::new()?);
        let listener = files.control_listener()?;
        sandbox.enter().map_err(ServerError::Sandbox)?;
        logging::start_thread();
        let quits = Arc::clone(&quit);
        let control = (disk.start_control)(listener, Arc::new(move || quits.ring()), Arc::clone(&requests))
            .map_err(ServerError::ControlThread)?;
        let server = Server { served: disk.served, signals, quit, requests, asked: 0 };
        let front_ends = FrontEnds::new(Arc::clone(&server.served))?;
        Ok(Daemon { server, front_ends, control, files })
    }

    /// Takes the guest over. What fails after it is ours is told, and it is served.
    fn take_over(self, config: &Config, taking: TakeOver) -> Result<Daemon, ServerError> {
        let Daemon { server, mut front_ends, control, files } = self;
        let taken = taking.finish(&*server.served, &mut front_ends);
        let (figures, misses) = taken.map_err(|error| {
            // Its thread lets go of the image, which the other one wants back.
            front_ends.join();
            ServerError::TakeOver(error)
        })?;
        let files = files.own(config);
        let listener = files.control_listener().unwrap_or_else(|error| {
            log::error!("{error}: the control socket is not answered");
            None
        });
        if let Err(error) = control.take_over(listener, figures.clone(), misses) {
            log::error!("the control socket is not answered: {error}");
        }
        log::info!("took the guest over: {figures}");
        take_over::tell(&figures);
        Ok(Daemon { server, front_ends, control, files })
    }

    /// Another process has the disk: nothing here touches it, or what that one goes on with.
    pub(super) fn leave(mut self, successor: NewDaemon) {
        log::info!("another process (pid {}) serves the disk: ending", successor.pid);
        if successor.pid != 0 {
            systemd::systemd(&format!("MAINPID={}", successor.pid));
        }
        self.files.give(successor.keeps);
        drop(self.control);
        self.front_ends.join();
        // Without it systemd takes our end for the service's.
        systemd::finish(NOTIFY_TIMEOUT);
    }

    /// Drains, syncs and ends. `served`: how serving ended.
    pub(super) fn end(self, served: Result<(), ServerError>) -> Result<(), ServerError> {
        let Daemon { mut server, mut front_ends, control, files } = self;
        if matches!(served, Err(ServerError::Impatient(_))) {
            std::mem::forget(control);
            return served;
        }
        // From here whoever connects learns at once that nobody serves.
        let _files = files.stop_listening();
        systemd::systemd("STOPPING=1");
        let ended = server.end();
        match ended {
            // Its thread may wait for the disk.
            Err(ServerError::Impatient(_)) => std::mem::forget(control),
            // Before the files: the thread ends, then the path goes.
            _ => drop(control),
        }
        if let (Err(error), Err(_)) = (&served, &ended) {
            log::error!("{error}");
        }
        ended?;
        // All is synced. What is left may hang for ever (librbd closing an image whose cluster is gone), and a second
        // signal ends it.
        if let Err(error) = server.signals.release() {
            log::warn!("a second signal will not be heard: {error}");
        }
        served?;
        // A library's exit handlers must not run while another thread lets go of the image.
        front_ends.join();
        Ok(())
    }
}
