//! Renewal of the certificate, with a new key each time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::link::RenewRequest;
use skerry_proto::link::link_client::LinkClient;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Identity, join};
use crate::link::Dial;

/// How often the certificate's age is looked at; also how soon a failed renewal is tried again.
const LOOK: Duration = Duration::from_secs(600);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Renews the certificate at two thirds of its life until `stop`. The new one is on disk before it is used.
pub async fn renew_loop(
    data_dir: PathBuf,
    identity: watch::Sender<Arc<Identity>>,
    dial: Arc<dyn Dial>,
    stop: CancellationToken,
) {
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        let current = Arc::clone(&identity.borrow());
        if !due(&current, Timestamp::now()) {
            continue;
        }
        match renew(&data_dir, &current, dial.as_ref()).await {
            Ok(renewed) => {
                tracing::info!(not_after = %renewed.not_after, "the site's certificate was renewed");
                identity.send_replace(Arc::new(renewed));
            }
            Err(reason) => {
                tracing::warn!(%reason, not_after = %current.not_after, "the site's certificate could not be renewed; it is tried again");
            }
        }
    }
}

fn due(identity: &Identity, now: Timestamp) -> bool {
    let life = identity.not_after.as_second() - identity.not_before.as_second();
    now.as_second() - identity.not_before.as_second() >= life / 3 * 2
}

async fn renew(data_dir: &std::path::Path, current: &Identity, dial: &dyn Dial) -> Result<Identity, String> {
    let (key, csr_der) = join::new_key()?;
    let channel = dial.dial().await?;
    let answer = tokio::time::timeout(
        ANSWER_LIMIT,
        LinkClient::new(channel).renew(RenewRequest { csr_der }),
    )
    .await
    .map_err(|_| "the provider did not answer".to_owned())?
    .map_err(|status| status.message().to_owned())?
    .into_inner();
    join::check(&answer, &current.site)?;
    join::save(data_dir, &current.site, &current.provider, &key, &answer).map_err(|e| e.to_string())?;
    Identity::load(data_dir).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_after_two_thirds_of_its_life() {
        let dir = tempfile::tempdir().unwrap();
        super::super::files::tests::joined(dir.path());
        let mut identity = Identity::load(dir.path()).unwrap();
        identity.not_before = Timestamp::from_second(1_000).unwrap();
        identity.not_after = Timestamp::from_second(1_090).unwrap();
        assert!(!due(&identity, Timestamp::from_second(1_059).unwrap()));
        assert!(due(&identity, Timestamp::from_second(1_060).unwrap()));
        assert!(due(&identity, Timestamp::from_second(5_000).unwrap()));
    }
}
