"""What each router replica is told of its ports."""

from cluster.pools import of_replica
from tests.support.scripted_worker import router_settings
from tidemill.core.settings import MetricsSettings, StatusPageSettings


def test_replicas_have_ports_of_their_own_and_clients_find_them_where_they_were() -> None:
    fixed = router_settings(router={"port": 7071, "replicas": 3}).model_copy(
        update={"metrics": MetricsSettings(router_port=9100), "status_page": StatusPageSettings(port=8080)}
    )
    three = [of_replica(fixed, index) for index in range(3)]
    ports = [(each.router.port, each.metrics.router_port, each.status_page.port) for each in three]
    assert ports == [(7071, 9100, 8080), (7072, 9101, 8081), (7073, 9102, 8082)]
    free = [of_replica(router_settings(), index, lambda: 5000) for index in range(2)]
    assert [each.router.port for each in free] == [5000] * 2, "fixed before the start, so that a restart finds it"
    assert {each.metrics.router_port for each in free} == {0}
