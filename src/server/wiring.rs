//! The one place that knows every part: makes the disk that a configuration describes.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use super::{Control, Served};
use crate::config::{BackendKind, Config};

/// Called by the control socket's thread when it is told to end the daemon.
pub(super) type Quit = Arc<dyn Fn() + Send + Sync>;

/// Starts to answer the control socket.
pub(super) type StartControl = Box<dyn FnOnce(UnixListener, Quit) -> io::Result<Box<dyn Control>>>;

/// An open image, checked, and how to control it.
pub(super) struct Opened {
    pub served: Arc<dyn Served>,
    pub start_control: StartControl,
}

/// Opens the image and makes the device. Nothing listens yet.
pub(super) fn open(config: &Config) -> Result<Opened, Box<dyn Error + Send + Sync>> {
    let image = match &config.backend {
        BackendKind::File(path) => Some((path.clone(), open_image(path.clone(), config.read_only)?)),
        BackendKind::Null(_) | BackendKind::Mem(_) => None,
    };
    Ok(Opened {
        served: Arc::new(Listener { image, connection: Mutex::default() }),
        start_control: Box::new(|listener, quit| {
            thread::Builder::new().name("control".into()).spawn(move || hear_quit(&listener, &quit))?;
            Ok(Box::new(Deaf))
        }),
    })
}

fn open_image(path: PathBuf, read_only: bool) -> Result<File, String> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(&path)
        .map_err(|error| format!("cannot open the image '{}': {error}", path.display()))
}

/// Stands in for the device until it is wired: hears a front-end out and says nothing.
struct Listener {
    image: Option<(PathBuf, File)>,
    connection: Mutex<Option<UnixStream>>,
}

impl Served for Listener {
    fn serve(&self, mut stream: UnixStream) -> io::Result<String> {
        *self.connection.lock().expect("no panic while held") = Some(stream.try_clone()?);
        io::copy(&mut stream, &mut io::sink())?;
        *self.connection.lock().expect("no panic while held") = None;
        Ok("the front-end left".to_string())
    }

    fn shutdown(&self) {
        if let Some(stream) = self.connection.lock().expect("no panic while held").as_ref() {
            // Not connected any more is what is wanted.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.image.as_ref().map_or(Ok(()), |(_, file)| file.sync_data())
    }

    fn describe(&self) -> String {
        self.image.as_ref().map_or("no image".to_string(), |(path, _)| path.display().to_string())
    }

    fn in_flight(&self) -> u64 {
        0
    }
}

/// Stands in for the control socket until it is wired: knows `quit`.
struct Deaf;

impl Control for Deaf {}

fn hear_quit(listener: &UnixListener, quit: &Quit) {
    for mut stream in listener.incoming().flatten() {
        let mut text = [0; 256];
        while let Ok(length @ 1..) = stream.read(&mut text) {
            if text[..length].windows(6).any(|word| word == b"\"quit\"") {
                quit();
            }
        }
    }
}
